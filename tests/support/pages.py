"""The page table of native/pages alone, with the data that it speaks of kept in Python: for its property tests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from cffi import FFI
from numpy.typing import NDArray

from xquant_gguf import native

PAGE = 128
SEALED, NONE, BYTES = -1, -2, -3


@lru_cache(maxsize=1)
def load() -> tuple[FFI, Any]:
    """libxquant with the functions of native/pages/xquant_pages.h."""
    ffi = FFI()
    for header in ("xquant.h", "xquant_pages.h"):
        ffi.cdef(native.declarations(native.LIBRARY_DIR / header))
    return ffi, ffi.dlopen(str(native.library_path("xquant")))


@dataclass(frozen=True)
class Move:
    """A page that goes from a slot to where `small` says, or comes into the slot."""

    stream: int
    page: int
    slot: int
    valid: int
    refill: int = NONE
    small: int = SEALED

    @classmethod
    def of(cls, words: NDArray[np.int32]) -> Move:
        valid = sum(int(np.uint32(word)) << 32 * i for i, word in enumerate(words[4:8]))
        return cls(int(words[0]), int(words[1]), int(words[2]), valid, int(words[3]), int(words[8]))


@dataclass(frozen=True)
class Plan:
    """What must happen before cells are written, and after."""

    fits: bool
    released: tuple[Move, ...]
    seals: tuple[Move, ...]
    shrinks: tuple[Move, ...]
    unseals: tuple[Move, ...]
    opens: tuple[Move, ...]
    to_codes: tuple[Move, ...]
    to_bytes: tuple[Move, ...]
    n_staged: int


class Table:
    """A page table and the cells that it looks at."""

    def __init__(
        self,
        n_streams: int,
        n_cells: int,
        n_slots: int,
        reserved: int,
        window: int,
        pinned: int,
        staged: int = 4,
        n_bytes: int = 0,
        first_block: int = 0,
    ) -> None:
        self.ffi, self.lib = load()
        shape = (n_streams, n_cells, n_slots, n_bytes, reserved, window, pinned, staged, first_block)
        table = self.lib.xq_pages_new(*shape)
        assert table != self.ffi.NULL
        self.table = self.ffi.gc(table, self.lib.xq_pages_free)
        self.n_pages = -(-n_cells // PAGE)
        self.sequences = np.zeros((n_streams, n_cells), np.uint64)
        self.positions = np.zeros((n_streams, n_cells), np.int32)

    def _cells(self) -> Any:
        cells = self.ffi.new("xq_pages_cells *")
        cells.sequences = self.ffi.from_buffer("uint64_t[]", self.sequences)
        cells.positions = self.ffi.from_buffer("int32_t[]", self.positions)
        return cells

    def state(self, stream: int, page: int) -> int:
        return int(self.lib.xq_pages_state(self.table, stream, page))

    def states(self, stream: int) -> list[int]:
        return [self.state(stream, page) for page in range(self.n_pages)]

    def age(self, stream: int, page: int) -> int:
        return int(self.lib.xq_pages_age(self.table, self._cells(), stream, page))

    def find(self, stream: int, sequences: list[int], head: int = 0) -> list[int]:
        out = np.zeros(len(sequences), np.uint32)
        n = self.lib.xq_pages_find(
            self.table, self._cells(), stream, len(sequences), sequences, head, self.ffi.from_buffer("uint32_t[]", out)
        )
        return [int(cell) for cell in out[:n]]

    def plan(self, stream: int, written: list[int]) -> Plan:
        moves = np.zeros((7 * self.n_pages + 4, 9), np.int32)
        counts = self.lib.xq_pages_plan(
            self.table, self._cells(), stream, len(written), written, self.ffi.from_buffer("int32_t[]", moves)
        )
        lists, at = [], 0
        names = ("released", "seals", "shrinks", "unseals", "opens", "after_codes", "after_bytes")
        for n in (getattr(counts, f"n_{name}") for name in names):
            lists.append(tuple(Move.of(words) for words in moves[at : at + n]))
            at += n
        released, seals, shrinks, unseals, opens, to_codes, to_bytes = lists
        n_staged = int(counts.n_staged)
        return Plan(bool(counts.fits), released, seals, shrinks, unseals, opens, to_codes, to_bytes, n_staged)

    def commit_seals(self) -> None:
        self.lib.xq_pages_commit_seals(self.table)

    def commit_shrinks(self) -> None:
        self.lib.xq_pages_commit_shrinks(self.table)

    def commit_opens(self) -> None:
        self.lib.xq_pages_commit_opens(self.table)

    def commit_after(self) -> None:
        self.lib.xq_pages_commit_after(self.table)

    def commit_lost(self) -> None:
        self.lib.xq_pages_commit_lost(self.table)

    def commit_left(self, step: int) -> list[Move]:
        moves = np.zeros((self.n_pages, 9), np.int32)
        n = self.lib.xq_pages_commit_left(self.table, step, self.ffi.from_buffer("int32_t[]", moves))
        return [Move.of(words) for words in moves[:n]]

    def wrote(self) -> None:
        self.lib.xq_pages_wrote(self.table, self._cells())

    def grow(self, n_slots: int, n_bytes: int, reserved: int, staged: int) -> None:
        self.lib.xq_pages_grow(self.table, n_slots, n_bytes, reserved, staged)

    def clear(self) -> None:
        self.lib.xq_pages_clear(self.table)
        self.sequences[:] = 0

    def copy_stream(self, source: int, target: int) -> None:
        self.lib.xq_pages_copy_stream(self.table, source, target)
        self.sequences[target], self.positions[target] = self.sequences[source], self.positions[source]
