"""The page table alone: whatever is written, removed, copied or interrupted, it says where each token's data lies."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from support.pages import NONE, PAGE, SEALED, Plan, Table

N_SEQ = 4


class Cache(RuleBasedStateMachine):
    """A cache whose data are numbers: rows of slots and codes of pages, moved as the table's plans say."""

    @initialize(
        n_streams=st.sampled_from([1, 1, 2]),
        n_cells=st.integers(1, 9 * PAGE),
        spare=st.integers(0, 5),
        window=st.sampled_from([-1, 0, 1, 100, PAGE, 300]),
        pinned=st.integers(0, 2),
        staged=st.integers(1, 5),
    )
    def make(self, n_streams: int, n_cells: int, spare: int, window: int, pinned: int, staged: int) -> None:
        n_pages = -(-n_cells // PAGE)
        wanted = pinned + -(-max(window, 0) // PAGE) + 1 + spare
        self.n_slots = n_pages if window < 0 else min(n_pages, wanted)
        self.window, self.pinned, self.staged = window, pinned, staged
        reserved = min(-(-max(window, 0) // PAGE), self.n_slots - 1)
        self.table = Table(n_streams, n_cells, self.n_slots, reserved, window, pinned, staged)
        self.seals = window >= 0 and self.n_slots < n_pages
        self.n_streams, self.n_cells = n_streams, n_cells
        self.values = np.full((n_streams, self.table.n_pages, PAGE), -1, np.int64)  # what each cell was given
        self.slots: NDArray[np.int64] = np.full((n_streams, self.n_slots, PAGE), -2, np.int64)
        self.codes = np.full((n_streams, self.table.n_pages, PAGE), -3, np.int64)
        self.stage: NDArray[np.int64] = np.full((staged, PAGE), -5, np.int64)
        self.next = 1  # values are never used twice
        self.ends = {(s, q): 0 for s in range(n_streams) for q in range(N_SEQ)}
        self.reserved = reserved
        self.written = [[0] * (N_SEQ + 1) for _ in range(n_streams)]  # tokens of each sequence, and of all
        # by page: the sequence that wrote last, and `written` then
        self.newest: list[dict[int, tuple[int, list[int]]]] = [{} for _ in range(n_streams)]

    def used(self, stream: int) -> list[int]:
        return [int(i) for i in np.flatnonzero(self.table.sequences[stream])]

    def run(self, plan: Plan, stop: int) -> bool:
        """Moves data as a plan says, at most `stop` pages; False: it was interrupted."""
        for move in plan.seals:
            if (stop := stop - 1) < 0:
                return False
            for t in range(PAGE):  # what is not valid becomes anything
                valid = move.valid >> t & 1
                self.codes[move.stream, move.page, t] = self.slots[move.stream, move.slot, t] if valid else -4
        self.table.commit_seals()
        for move in plan.unseals:
            if (stop := stop - 1) < 0:
                return False
            self.slots[move.stream, move.slot] = self.codes[move.stream, move.page]
        self.table.commit_opens()
        return stop > 0

    def rows(self, stream: int, slot: int) -> NDArray[np.int64]:
        return self.slots[stream, slot] if slot < self.n_slots else self.stage[slot - self.n_slots]

    def run_after(self, stream: int, plan: Plan, stop: int) -> bool:
        """Seals what left the window, at most `stop` pages; False: it was interrupted, and the rest is sealed now."""
        done = plan.after[:stop]
        if 0 < len(done) < len(plan.after):
            done += tuple(move for move in plan.after[stop:] if move.slot < self.n_slots)
        for i, move in enumerate(done):
            lies = self.rows(stream, move.slot)
            for t in range(PAGE):
                self.codes[stream, move.page, t] = lies[t] if move.valid >> t & 1 else -4
            if move.refill != NONE and i < stop:
                lies[:] = self.rows(stream, move.refill)
        if stop < len(plan.after):
            self.table.commit_undone(stop > 0)
            return False
        self.table.commit_after()
        return True

    def check_plan(self, stream: int, plan: Plan, written: set[int]) -> None:
        states = self.table.states(stream)
        moved = [move.page for moves in (plan.released, plan.seals, plan.unseals, plan.opens) for move in moves]
        assert len(moved) == len(set(moved))
        free = set(range(self.n_slots)) - {s for s in states if s >= 0}
        for move in (*plan.released, *plan.seals):
            assert states[move.page] == move.slot
            assert move.page not in written
            free |= {move.slot} - {SEALED}
        assert {move.page for move in (*plan.unseals, *plan.opens)} == {p for p in written if states[p] < 0}
        taken = [move.slot for move in (*plan.unseals, *plan.opens)]
        assert len(taken) == len(set(taken))
        staged = {slot for slot in taken if slot >= self.n_slots}
        assert staged == {self.n_slots + i for i in range(plan.n_staged)}
        assert plan.n_staged <= self.staged
        assert set(taken) - staged <= free
        assert all(move.slot not in staged for move in plan.unseals)
        now = {move.page: move.slot for move in (*plan.unseals, *plan.opens)}
        now |= {
            p: s for p, s in enumerate(states) if s >= 0 and p not in {m.page for m in (*plan.released, *plan.seals)}
        }
        assert all(now[move.page] == move.slot for move in plan.after)
        assert len({move.page for move in plan.after}) == len(plan.after)
        # each page of the stage is sealed or moves into a slot that a sealed page leaves
        refills = [move.refill for move in plan.after if move.refill != NONE]
        assert all(move.slot < self.n_slots for move in plan.after if move.refill != NONE)
        assert sorted([*refills, *(move.slot for move in plan.after if move.slot in staged)]) == sorted(staged)
        assert plan.n_staged > 0 or not plan.after
        for move in plan.after:
            here = [i - move.page * PAGE for i in self.used(stream) if i // PAGE == move.page]
            assert [t for t in range(PAGE) if move.valid >> t & 1] == here
        assert all(states[move.page] == SEALED for move in plan.unseals)
        for move in plan.seals:
            cells = [t for t in range(PAGE) if move.valid >> t & 1]
            here = [i - move.page * PAGE for i in self.used(stream) if i // PAGE == move.page]
            assert cells == here

    @rule(
        data=st.data(),
        n=st.one_of(st.integers(1, 5), st.integers(1, 3 * PAGE)),
        stop=st.one_of(st.just(99), st.integers(0, 4)),
        stop_after=st.one_of(st.just(99), st.integers(0, 4)),
    )
    def write(self, data: st.DataObject, n: int, stop: int, stop_after: int) -> None:
        stream = data.draw(st.integers(0, self.n_streams - 1))
        owners = data.draw(st.lists(st.integers(0, N_SEQ - 1), min_size=1, max_size=3))
        head = data.draw(st.integers(0, self.n_cells))
        tokens = [owners[i % len(owners)] for i in range(n)]
        cells = self.table.find(stream, tokens, head)
        before = self.table.states(stream)
        free = self.n_cells - len(self.used(stream))
        if not cells:
            budget = (
                self.table.n_pages if not self.seals else self.n_slots - min(-(-self.window // PAGE), self.n_slots - 1)
            )
            assert n > free or self.table.n_pages > min(budget, self.staged)
            return
        assert len(set(cells)) == n
        assert not set(cells) & set(self.used(stream))
        assert max(cells) < self.n_cells
        for cell, owner in zip(cells, tokens, strict=True):  # as llama.cpp does, cells are taken first
            self.table.sequences[stream, cell] = 1 << owner
            self.table.positions[stream, cell] = self.ends[stream, owner]
            self.ends[stream, owner] += 1
        plan = self.table.plan(stream, cells)
        assert plan == self.table.plan(stream, cells)
        assert before == self.table.states(stream)
        assert plan.fits
        self.check_plan(stream, plan, {c // PAGE for c in cells})
        if not self.run(plan, stop):
            for cell in cells:  # and given back, when a batch fails
                self.table.sequences[stream, cell] = 0
            return
        for cell in cells:
            slot = self.table.state(stream, cell // PAGE)
            assert slot >= 0
            self.rows(stream, slot)[cell % PAGE] = self.values[stream, cell // PAGE, cell % PAGE] = self.next
            self.next += 1
        self.table.wrote()
        if not self.run_after(stream, plan, stop_after):
            for cell in cells:
                self.table.sequences[stream, cell] = 0
            written_now = False
        else:
            written_now = True
        for cell, owner in zip(cells, tokens, strict=True):
            for which in (owner, N_SEQ):
                self.written[stream][which] += 1
            self.newest[stream][cell // PAGE] = owner, list(self.written[stream])
        if written_now:
            self.check_policy(stream, {c // PAGE for c in cells}, n)

    def check_policy(self, stream: int, written: set[int], n: int) -> None:
        """What left the window is sealed, but for pinned pages."""
        for page, state in enumerate(self.table.states(stream)):
            cells = [i for i in self.used(stream) if i // PAGE == page]
            if self.seals and state >= 0 and page not in written and cells:
                lowest = min(self.table.positions[stream, cells])
                assert self.table.age(stream, page) - n < self.window or lowest < self.pinned * PAGE
            if state != NONE and cells:
                owner, then = self.newest[stream][page]
                own = all(self.table.sequences[stream, cell] >> owner & 1 for cell in cells)
                which = owner if own else N_SEQ
                assert self.table.age(stream, page) == self.written[stream][which] - then[which]

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        stream = data.draw(st.integers(0, self.n_streams - 1))
        owner = data.draw(st.integers(0, N_SEQ - 1))
        first, length = data.draw(st.integers(0, 3 * PAGE)), data.draw(st.sampled_from([1, 50, PAGE, 9 * PAGE]))
        low = np.uint64(1 << owner)
        hit = (self.table.sequences[stream] & low != 0) & (self.table.positions[stream] >= first)
        hit &= self.table.positions[stream] < first + length
        self.table.sequences[stream, hit] &= ~low
        if first + length > self.ends[stream, owner]:
            self.ends[stream, owner] = min(first, self.ends[stream, owner])

    @rule(data=st.data(), by=st.integers(-PAGE, PAGE))
    def shift(self, data: st.DataObject, by: int) -> None:
        stream = data.draw(st.integers(0, self.n_streams - 1))
        self.table.positions[stream] = np.maximum(self.table.positions[stream] + by, 0)

    @rule(data=st.data(), one=st.integers(0, N_SEQ - 1), other=st.integers(0, N_SEQ - 1))
    def share(self, data: st.DataObject, one: int, other: int) -> None:
        stream = data.draw(st.integers(0, self.n_streams - 1))
        mine = self.table.sequences[stream] & np.uint64(1 << one) != 0
        self.table.sequences[stream, mine] |= np.uint64(1 << other)

    @precondition(lambda self: self.n_streams > 1)
    @rule(source=st.integers(0, 1))
    def copy_stream(self, source: int) -> None:
        target = 1 - source
        self.table.copy_stream(source, target)
        for array in (self.values, self.slots, self.codes):
            array[target] = array[source]
        self.written[target] = list(self.written[source])
        self.newest[target] = dict(self.newest[source])

    @precondition(lambda self: self.n_slots < self.table.n_pages)
    @rule(n=st.integers(1, 3))
    def grow(self, n: int) -> None:
        n = min(n, self.table.n_pages - self.n_slots)
        self.n_slots += n
        self.table.grow(self.n_slots, self.reserved, self.staged)
        self.seals = self.window >= 0 and self.n_slots < self.table.n_pages
        more = np.full((self.n_streams, n, PAGE), -2, np.int64)
        self.slots = np.concatenate([self.slots, more], axis=1)

    @rule()
    def clear(self) -> None:
        self.table.clear()
        self.ends = dict.fromkeys(self.ends, 0)
        self.written = [[0] * (N_SEQ + 1) for _ in range(self.n_streams)]
        self.newest = [{} for _ in range(self.n_streams)]

    @invariant()
    def finds_every_token(self) -> None:
        for stream in range(self.n_streams):
            states = self.table.states(stream)
            slots = [state for state in states if state >= 0]
            assert len(slots) == len(set(slots))
            assert all(slot < self.n_slots for slot in slots)
            for cell in self.used(stream):
                page, t = divmod(cell, PAGE)
                assert states[page] != NONE
                lies = self.codes[stream, page] if states[page] == SEALED else self.slots[stream, states[page]]
                assert lies[t] == self.values[stream, page, t]


Cache.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestCache = Cache.TestCase


def written(table: Table, tokens: list[int], stream: int = 0, position: int = 0) -> list[int]:
    """Writes a token of each of the sequences, at rising positions; its cells."""
    cells = table.find(stream, tokens, 0)
    assert cells
    for i, (cell, owner) in enumerate(zip(cells, tokens, strict=True)):
        table.sequences[stream, cell], table.positions[stream, cell] = 1 << owner, position + i
    plan = table.plan(stream, cells)
    assert plan.fits
    table.commit_seals()
    table.commit_opens()
    table.wrote()
    table.commit_after()
    return cells


def test_sequences_do_not_share_pages_while_there_are_others() -> None:
    table = Table(1, 16 * PAGE, 9, 2, 256, 1)
    cells = [written(table, [0, 1, 2], position=i) for i in range(200)]
    for owner in range(3):
        pages = {row[owner] // PAGE for row in cells}
        others = {row[other] // PAGE for row in cells for other in range(3) if other != owner}
        assert not pages & others


def test_a_sequence_that_waits_keeps_its_window() -> None:
    """While another one writes, with slots for both; a page that both have is as old as anybody's tokens make it."""
    table = Table(1, 32 * PAGE, 8, 2, PAGE, 1)
    waiting = {cell // PAGE for cell in written(table, [0] * (3 * PAGE))}
    for i in range(6):
        written(table, [1] * PAGE, position=i * PAGE)
    assert sum(table.state(0, page) >= 0 for page in waiting) == 2  # pinned, and the newest
    table.sequences[0, : 3 * PAGE] |= np.uint64(2)  # now the other one has it too
    assert table.age(0, max(waiting)) == 0
    table.sequences[0, 2 * PAGE + 5] = 2
    assert table.age(0, max(waiting)) == 6 * PAGE


def test_micro_batches_of_a_batch_fill_one_page() -> None:
    """llama.cpp looks for the cells of all of them before the first is written."""
    table = Table(1, 8 * PAGE, 6, 2, 2 * PAGE, 1)
    written(table, [0] * (3 * PAGE))
    first = table.find(0, [0] * 60, 0)
    table.sequences[0, first] = 1
    assert first + table.find(0, [0] * 60, 0) == list(range(3 * PAGE, 3 * PAGE + 120))


def test_sequences_share_pages_when_there_are_no_others() -> None:
    table = Table(1, 2 * PAGE, 2, 0, -1, 0)
    cells = [cell for i in range(64) for cell in written(table, [0, 1, 2, 3], position=i)]
    assert sorted(cells) == list(range(2 * PAGE))
    assert table.find(0, [0], 0) == []


def test_free_cells_of_sealed_pages_are_written_last() -> None:
    table = Table(1, 4 * PAGE, 3, 1, PAGE, 1)
    for i in range(4 * PAGE):
        written(table, [0], position=i)
    assert table.states(0)[1] == SEALED
    table.sequences[0, PAGE + 10] = table.sequences[0, 3 * PAGE + 10] = 0
    assert table.find(0, [0], 0) == [3 * PAGE + 10]
    assert sorted(table.find(0, [0, 0], 0)) == [PAGE + 10, 3 * PAGE + 10]


def test_pinned_pages_are_sealed_last_and_the_first_of_all_at_the_very_last() -> None:
    table = Table(1, 8 * PAGE, 3, 0, 10 * PAGE, 2)
    for i in range(3 * PAGE):
        written(table, [0], position=i)
    assert all(state >= 0 for state in table.states(0)[:3])
    sealed = []
    for page in range(3, 6):
        for i in range(PAGE):
            written(table, [0], position=page * PAGE + i)
        sealed.append([p for p, state in enumerate(table.states(0)) if state == SEALED])
    assert sealed == [[2], [2, 3], [2, 3, 4]]
