"""Which pages the page table seals, shrinks and opens, and which cells it gives: rule by rule (page_table.h)."""

from __future__ import annotations

import numpy as np

from support.pages import BYTES, NONE, PAGE, SEALED, Table


def written(table: Table, tokens: list[int], stream: int = 0, position: int = 0) -> list[int]:
    """Writes a token of each of the sequences, at rising positions; its cells."""
    cells = table.find(stream, tokens, 0)
    assert cells
    for i, (cell, owner) in enumerate(zip(cells, tokens, strict=True)):
        table.sequences[stream, cell], table.positions[stream, cell] = 1 << owner, position + i
    plan = table.plan(stream, cells)
    assert plan.fits
    table.commit_seals()
    table.commit_shrinks()
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


def kinds(table: Table) -> str:
    """Of each page: r rows, b bytes, c codes, - nothing."""
    return "".join("c" if s == SEALED else "-" if s == NONE else "b" if s <= BYTES else "r" for s in table.states(0))


def test_open_pages_that_are_not_written_lie_in_bytes() -> None:
    """One slot of rows serves one sequence, token by token or in micro-batches; the window and page 0 are in bytes."""
    for step in (1, 16, 100, PAGE):
        table = Table(1, 8 * PAGE, 1, 0, PAGE, 1, n_bytes=2)
        for first in range(0, 6 * PAGE, step):
            written(table, [0] * min(step, 6 * PAGE - first), position=first)
            assert sum(s >= 0 for s in table.states(0)) == 1
        assert kinds(table) == ("bcccbr--" if step != PAGE else "bccccr--")


def test_pages_without_blocks_stay_open_whatever_they_hold() -> None:
    """A context shift forgets the first page, which then takes later tokens; what is first now is sealed."""
    table = Table(1, 8 * PAGE, 1, 0, PAGE, 1, n_bytes=2, first_block=1)
    for i in range(8 * PAGE):
        written(table, [0], position=i)
    assert kinds(table) == "bcccccbr"
    table.sequences[0, : 2 * PAGE] = 0
    table.positions[0] -= 2 * PAGE
    for i in range(2 * PAGE):
        written(table, [0], position=6 * PAGE + i)
        assert kinds(table)[0] in "br"
    assert kinds(table) == "brcccccc"


def test_the_slot_of_a_page_that_lost_its_cells_serves_another_that_is_written() -> None:
    """One slot: the last page of a sequence that was removed holds it, the one that is gone on with lies in bytes."""
    table = Table(1, 5 * PAGE, 1, 0, PAGE, 1, n_bytes=2)
    written(table, [0] * 30)
    other = {cell // PAGE for cell in written(table, [1] * 40)}
    assert kinds(table) == "br---"
    table.sequences[0, table.sequences[0] == 2] = 0
    cells = table.find(0, [0] * 200, 0)
    assert {cell // PAGE for cell in cells} == {0, 1} | other
    written(table, [0] * 200, position=30)
    assert kinds(table) == "br---"


def test_a_page_is_sealed_from_rows_where_it_can() -> None:
    """Micro-batches that leave the window seal what lay in the slot, which never was in bytes."""
    table = Table(1, 16 * PAGE, 1, 0, PAGE, 1, n_bytes=2)
    for first in range(0, 12 * PAGE, 4 * PAGE):
        cells = table.find(0, [0] * (4 * PAGE), 0)
        table.sequences[0, cells], table.positions[0, cells] = 1, np.arange(first, first + 4 * PAGE)
        plan = table.plan(0, cells)
        assert not plan.seals
        assert not plan.shrinks
        assert [move.page for move in plan.to_bytes] == ([0] if first == 0 else [])
        for commit in (table.commit_seals, table.commit_shrinks, table.commit_opens, table.wrote, table.commit_after):
            commit()
    assert kinds(table) == "b" + 10 * "c" + "r" + 4 * "-"


def test_two_sequences_that_take_turns_in_one_slot() -> None:
    """The page that waits goes to bytes, not to codes: there is a byte slot more than pages that wait."""
    table = Table(1, 16 * PAGE, 1, 0, PAGE, 1, n_bytes=4)
    for owner in (0, 1):
        written(table, [owner] * 200)
    for i in range(20):
        written(table, [i % 2], position=200 + i)
    assert sorted(kinds(table)) == sorted("bbbr" + 12 * "-")
