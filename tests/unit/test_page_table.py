"""The page table alone: whatever is written, removed, copied or interrupted, it says where each token's data lies."""

from __future__ import annotations

from collections.abc import Iterable

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from support.pages import BYTES, NONE, PAGE, SEALED, Move, Plan, Table

N_SEQ = 4


class Cache(RuleBasedStateMachine):
    """A cache of two layers whose data are numbers: rows, bytes and codes, moved as the table's plans say."""

    @initialize(
        n_streams=st.sampled_from([1, 1, 2]),
        n_cells=st.integers(1, 9 * PAGE),
        spare=st.integers(0, 5),
        in_bytes=st.integers(0, 5),
        window=st.sampled_from([-1, 0, 1, 100, PAGE, 300]),
        pinned=st.integers(0, 2),
        staged=st.integers(1, 5),
        rest=st.booleans(),
    )
    def make(
        self, n_streams: int, n_cells: int, spare: int, in_bytes: int, window: int, pinned: int, staged: int, rest: bool
    ) -> None:
        n_pages = -(-n_cells // PAGE)
        stay = pinned + -(-max(window, 0) // PAGE)
        self.n_slots = n_pages if window < 0 else min(n_pages, 1 + spare + (0 if in_bytes else stay))
        self.n_bytes = in_bytes if self.n_slots < n_pages else 0
        self.window, self.pinned, self.staged = window, pinned, staged
        # as xq_plan_first_block has it: one byte slot is left when such pages, and as many as there are slots, have one
        self.first_block = pinned if rest and self.n_bytes >= self.n_slots + pinned and pinned < n_pages else 0
        self.reserved = 0 if self.n_bytes else min(-(-max(window, 0) // PAGE), self.n_slots - 1)
        self.table = Table(
            n_streams, n_cells, self.n_slots, self.reserved, window, pinned, staged, self.n_bytes, self.first_block
        )
        self.seals = window >= 0 and self.n_slots < n_pages
        self.n_streams, self.n_cells = n_streams, n_cells
        self.values = np.full((n_streams, self.table.n_pages, PAGE), -1, np.int64)  # what each cell was given
        self.slots: NDArray[np.int64] = np.full((2, n_streams, self.n_slots, PAGE), -2, np.int64)
        self.bytes: NDArray[np.int64] = np.full((2, n_streams, self.n_bytes, PAGE), -6, np.int64)
        self.codes = np.full((2, n_streams, self.table.n_pages, PAGE), -3, np.int64)
        self.codes[:, :, : self.first_block] = -7  # they are never looked at
        self.stage: NDArray[np.int64] = np.full((2, staged, PAGE), -5, np.int64)
        self.next = 1  # values are never used twice
        self.ends = {(s, q): 0 for s in range(n_streams) for q in range(N_SEQ)}
        self.written = [[0] * (N_SEQ + 1) for _ in range(n_streams)]  # tokens of each sequence, and of all
        # by page: the sequence that wrote last, and `written` then
        self.newest: list[dict[int, tuple[int, list[int]]]] = [{} for _ in range(n_streams)]

    def used(self, stream: int) -> list[int]:
        return [int(i) for i in np.flatnonzero(self.table.sequences[stream])]

    def at(self, stream: int, page: int, state: int, layer: int) -> NDArray[np.int64]:
        """The data of a page that lies there."""
        if state == SEALED:
            return self.codes[layer, stream, page]
        if state <= BYTES:
            return self.bytes[layer, stream, BYTES - state]
        if state < self.n_slots:
            return self.slots[layer, stream, state]
        return self.stage[layer, state - self.n_slots]

    def make_smaller(self, moves: Iterable[Move], layers: Iterable[int], refill: bool = False) -> None:
        """What is not valid becomes anything."""
        for layer in layers:
            for move in moves:
                lies = self.at(move.stream, move.page, move.slot, layer)
                valid = [move.valid >> t & 1 for t in range(PAGE)]
                self.at(move.stream, move.page, move.small, layer)[:] = np.where(valid, lies, -4)
                if refill and move.refill != NONE:
                    lies[:] = self.at(move.stream, move.page, move.refill, layer)

    def run(self, plan: Plan, stop: int) -> bool:
        """Moves data as a plan says, at most `stop` pages; False: it was interrupted."""
        for moves, commit in ((plan.seals, self.table.commit_seals), (plan.shrinks, self.table.commit_shrinks)):
            self.make_smaller(moves[:stop], (0, 1))
            if (stop := stop - len(moves)) < 0:
                return False
            commit()
        for move in plan.unseals:
            if (stop := stop - 1) < 0:
                return False
            for layer in (0, 1):
                self.at(move.stream, move.page, move.slot, layer)[:] = self.at(
                    move.stream, move.page, move.small, layer
                )
        self.table.commit_opens()
        return True

    def run_after(self, plan: Plan, done: tuple[int, int]) -> bool:
        """Clears the stage; done: steps that each of the layers did before the graph stopped."""
        steps = plan.to_codes, plan.to_bytes
        for step, moves in enumerate(steps):
            self.make_smaller(moves, [layer for layer in (0, 1) if step < done[layer]], refill=True)
        if done == (2, 2):
            self.table.commit_after()
            return True
        self.table.commit_lost()
        for step in (0, 1):
            undone = [layer for layer in (0, 1) if step >= done[layer]]
            if len(undone) == 2:
                break
            left = self.table.commit_left(step)
            assert {move.page for move in left} <= {move.page for move in steps[step]}
            self.make_smaller(left, undone)
        return False

    def check_plan(self, stream: int, plan: Plan, written: set[int], held: set[int]) -> None:
        """held: pages that had cells before; a written one that had none is released, and opened anew."""
        anew = {move.page for move in plan.released} & written - held
        states = self.table.states(stream)
        before = (*plan.released, *plan.seals, *plan.shrinks)
        for pages in (before, (*plan.seals, *plan.shrinks, *plan.unseals, *plan.opens)):
            assert len({move.page for move in pages}) == len(pages)
        free = set(range(self.n_slots)) - {s for s in states if s >= 0}
        free_bytes = {BYTES - i for i in range(self.n_bytes)} - {s for s in states if s <= BYTES}
        for move in before:
            assert states[move.page] == move.slot
            assert move.page not in written - anew
        for move in (*plan.released, *plan.seals):
            free |= {move.slot} - {SEALED}
            free_bytes |= {move.slot} - {SEALED}
            assert move.small == SEALED
        for move in plan.shrinks:
            free_bytes.remove(move.small)
            free.add(move.slot)
        assert {move.page for move in (*plan.unseals, *plan.opens)} == {p for p in written if states[p] < 0} | anew
        taken = [move.slot for move in (*plan.unseals, *plan.opens)]
        assert len(taken) == len(set(taken))
        staged = {slot for slot in taken if slot >= self.n_slots}
        assert staged == {self.n_slots + i for i in range(plan.n_staged)}
        assert plan.n_staged <= self.staged
        assert {slot for slot in taken if slot < self.n_slots} <= free
        assert all(move.slot not in staged for move in plan.unseals)
        now = dict(enumerate(states))
        now |= {move.page: NONE for move in plan.released} | {
            move.page: move.small for move in (*plan.seals, *plan.shrinks)
        }
        now |= {move.page: move.slot for move in (*plan.unseals, *plan.opens)}
        free_bytes |= {move.small for move in plan.unseals if move.small <= BYTES}
        after = (*plan.to_codes, *plan.to_bytes)
        assert all(now[move.page] == move.slot != SEALED for move in after)
        assert len({move.page for move in after}) == len(after)
        # each page of the stage becomes smaller or moves into a slot that such a page leaves
        refills = [move.refill for move in after if move.refill != NONE]
        assert all(0 <= move.slot < self.n_slots for move in after if move.refill != NONE)
        assert sorted([*refills, *(move.slot for move in after if move.slot in staged)]) == sorted(staged)
        assert plan.n_staged > 0 or not after
        assert all(move.small == SEALED for move in (*plan.to_codes, *plan.seals))
        free_bytes |= {move.slot for move in plan.to_codes if move.slot <= BYTES}
        assert {move.small for move in plan.to_bytes} <= free_bytes
        assert len({move.small for move in plan.to_bytes}) == len(plan.to_bytes)
        assert all(move.slot >= 0 for move in (*plan.to_bytes, *plan.shrinks))
        assert all(states[move.page] == move.small != NONE for move in plan.unseals)
        for move in (*plan.seals, *plan.shrinks, *after):
            here = [i - move.page * PAGE for i in self.used(stream) if i // PAGE == move.page]
            assert [t for t in range(PAGE) if move.valid >> t & 1] == here

    @rule(
        data=st.data(),
        n=st.one_of(st.integers(1, 5), st.integers(1, 3 * PAGE)),
        stop=st.one_of(st.just(99), st.integers(0, 4)),
        done=st.sampled_from([(2, 2), (2, 2), (2, 2), (2, 1), (2, 0), (1, 1), (1, 0), (0, 0)]),
    )
    def write(self, data: st.DataObject, n: int, stop: int, done: tuple[int, int]) -> None:
        stream = data.draw(st.integers(0, self.n_streams - 1))
        owners = data.draw(st.lists(st.integers(0, N_SEQ - 1), min_size=1, max_size=3))
        head = data.draw(st.integers(0, self.n_cells))
        tokens = [owners[i % len(owners)] for i in range(n)]
        cells = self.table.find(stream, tokens, head)
        before, held = self.table.states(stream), {cell // PAGE for cell in self.used(stream)}
        free = self.n_cells - len(self.used(stream))
        if not cells:
            budget = self.table.n_pages if not self.seals else self.n_slots - self.reserved
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
        self.check_plan(stream, plan, {c // PAGE for c in cells}, held)
        if not self.run(plan, stop):
            for cell in cells:  # and given back, when a batch fails
                self.table.sequences[stream, cell] = 0
            return
        for cell in cells:
            slot = self.table.state(stream, cell // PAGE)
            assert slot >= 0
            for layer in (0, 1):
                self.at(stream, cell // PAGE, slot, layer)[cell % PAGE] = self.next
            self.values[stream, cell // PAGE, cell % PAGE] = self.next
            self.next += 1
        self.table.wrote()
        if not (written_now := self.run_after(plan, done)):
            for cell in cells:
                self.table.sequences[stream, cell] = 0
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
            if self.seals and state not in (SEALED, NONE) and page not in written and cells:
                lowest = min(self.table.positions[stream, cells])
                stays = lowest < self.pinned * PAGE or page < self.first_block
                assert self.table.age(stream, page) - n < self.window or stays
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
        self.values[target] = self.values[source]
        for array in (self.slots, self.bytes, self.codes):
            array[:, target] = array[:, source]
        self.written[target] = list(self.written[source])
        self.newest[target] = dict(self.newest[source])

    @precondition(lambda self: self.n_slots < self.table.n_pages)
    @rule(n=st.integers(0, 3), in_bytes=st.integers(0, 3))
    def grow(self, n: int, in_bytes: int) -> None:
        n = min(n, self.table.n_pages - self.n_slots, in_bytes if self.first_block else 3)
        self.n_slots += n
        self.n_bytes += in_bytes
        self.table.grow(self.n_slots, self.n_bytes, self.reserved, self.staged)
        self.seals = self.window >= 0 and self.n_slots < self.table.n_pages
        self.slots = np.concatenate([self.slots, np.full((2, self.n_streams, n, PAGE), -2, np.int64)], axis=2)
        self.bytes = np.concatenate([self.bytes, np.full((2, self.n_streams, in_bytes, PAGE), -6, np.int64)], axis=2)

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
            taken = [state for state in states if state not in (SEALED, NONE)]
            assert len(taken) == len(set(taken))
            assert SEALED not in states[: self.first_block]
            assert all(BYTES - self.n_bytes < state < self.n_slots for state in taken)
            for cell in self.used(stream):
                page, t = divmod(cell, PAGE)
                assert states[page] != NONE
                for layer in (0, 1):
                    assert self.at(stream, page, states[page], layer)[t] == self.values[stream, page, t]


Cache.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestCache = Cache.TestCase
