"""One layer's storage on a device, with the five verbs as methods over arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.devices import Buffer, Device, Refused
from xquant_gguf import native
from xquant_gguf.plan import PAGE, Layer, Side, side_to_c

SEALED, NONE, BYTES = -1, -2, -3  # enum xq_slot; byte slot n: BYTES - n
ALL = np.ones(PAGE, bool)
APART = 192  # bytes between streams, besides what a stream has

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]
Halves = NDArray[np.float16]


@dataclass(frozen=True)
class Move:
    """A page that gets smaller or larger, or whose keys are read or written; slot: or SEALED, or of bytes; refill: or
    NONE; small: where it lies when it is smaller."""

    page: int
    slot: int
    valid: Bools = field(default_factory=lambda: ALL)
    stream: int = 0
    refill: int = NONE
    small: int = SEALED

    def words(self) -> list[int]:
        valid = np.packbits(self.valid, bitorder="little").view("<i4").tolist()
        return [self.stream, self.page, self.slot, self.refill, *valid, self.small]


def c_layer(layer: Layer) -> Any:
    """A Layer as an xq_layer."""
    c = native.load()[0].new("xq_layer *")
    for name in "kv":
        side_to_c(getattr(c, name), getattr(layer, name), name)
    return c


class Storage:
    """Blocks, poisoned, and open pages of one layer.

    rows: K [stream][KV head][slot][PAGE][d], V [...][e], F16.  owner: the layer whose codes the borrowed sides read.
    latent: so many of the values' channels, the first, are those of the keys; rows of V: the others, or empty.
    staged: so many of the slots, the last, lie in the stage: in no stream (those of `rows` of stream 0 are taken).
    n_bytes: byte slots, poisoned.  first_block: pages before it have no block.
    source, map_: the layer that predicts V; heads of it [KV head], and [KV head][e][e].  seals: whether it has blocks.
    """

    def __init__(
        self,
        device: Device,
        layer: Layer,
        rows: tuple[Halves, Halves],
        n_pages: int,
        owner: Storage | None = None,
        source: Storage | None = None,
        map_: tuple[NDArray[np.int32], Floats] | None = None,
        seals: bool = True,
        latent: int = 0,
        staged: int = 0,
        n_bytes: int = 0,
        first_block: int = 0,
    ) -> None:
        ffi, lib = native.load()
        self.device, self.layer, self.n_pages = device, layer, n_pages
        self.owner, self.source, self.map = owner, source, map_
        self.streams, self.heads, n_slots, _, self.d = rows[0].shape
        self.staged, self.slots = staged, n_slots - staged
        self.latent, self.stored_e = latent, rows[1].shape[-1]
        self.e = latent + self.stored_e
        c, self.layout = c_layer(layer), ffi.new("xq_block_layout *")
        self.n_bytes, self.first_block = n_bytes, first_block
        sizes = (self.d, self.stored_e, self.heads, n_pages, self.slots, self.streams, n_bytes, first_block)
        shape = ffi.new("xq_shape *", sizes)
        n_blocks, n_rows = lib.xq_store_block_bytes(c, shape), lib.xq_store_row_bytes(shape)
        assert lib.xq_block_layout_of(c, self.d, self.stored_e, self.layout) == 0, native.error()
        self.blocks_stream, self.rows_stream = n_blocks + APART, n_rows + APART
        self.blocks = Buffer(device, self.streams * self.blocks_stream) if seals else None
        self.open = Buffer(device, self.streams * self.rows_stream)
        self.n_halves = 2 * self.heads * self.slots * PAGE * (self.d + self.stored_e)  # bytes of F16 rows of a stream
        self.stage = Buffer(device, max(self.n_halves // self.slots * staged, 1))
        self.set_rows(rows)
        self.nonfinite = Buffer(device, np.zeros(1, np.uint64))
        self.c = ffi.new("xq_store *")
        blocks = self.blocks.pointer("uint8_t") if self.blocks else ffi.NULL
        self._ok(
            lib.xq_store_init(
                self.c, c, shape, blocks, self.blocks_stream, self.open.pointer("uint16_t"), self.rows_stream
            )
        )
        for is_k, side in enumerate((layer.v, layer.k)):
            if side.owner >= 0:
                assert owner is not None
                self._ok(lib.xq_store_borrow(self.c, is_k, owner.c))
        if latent:
            self._ok(lib.xq_store_latent(self.c, latent))
        if staged:
            self._ok(lib.xq_store_stage(self.c, self.stage.pointer("uint16_t"), staged))
        if source is not None and map_ is not None:
            self._map = [Buffer(device, x) for x in map_]
            heads, map_at = self._map[0].pointer("int32_t"), self._map[1].pointer("float")
            self._ok(lib.xq_store_map(self.c, source.c, heads, map_at))

    def _ok(self, status: int) -> None:
        if status != 0:
            raise Refused(native.error())

    # ---- what is stored ----

    def set_rows(self, rows: tuple[Halves, Halves]) -> None:
        """Overwrites all F16 rows."""
        own, staged = ([x[:, :, part] for x in rows] for part in (slice(self.slots), slice(self.slots, None)))
        for s in range(self.streams):
            self.open.set(np.concatenate([x[s].reshape(-1).view(np.uint8) for x in own]), s * self.rows_stream)
        if self.staged:
            self.stage.set(np.concatenate([x[0].reshape(-1).view(np.uint8) for x in staged]))

    def rows(self) -> tuple[Halves, Halves]:
        """The F16 rows of streams as they are now."""
        flat = self.open.get(np.uint8, (self.streams, self.rows_stream))[:, : self.n_halves].copy().view(np.float16)
        n, shape = self.heads * self.slots * PAGE * self.d, (self.streams, self.heads, self.slots, PAGE)
        return flat[:, :n].reshape(*shape, self.d), flat[:, n:].reshape(*shape, self.stored_e)

    def staged_rows(self) -> tuple[Halves, Halves]:
        """Those of the stage, [KV head][slot][PAGE][d or e]."""
        flat = self.stage.get(np.float16, (self.stage.bytes // 2,))
        n, shape = self.heads * self.staged * PAGE * self.d, (self.heads, self.staged, PAGE)
        return flat[:n].reshape(*shape, self.d), flat[n:].reshape(*shape, self.stored_e)

    def byte_blocks(self) -> NDArray[np.uint8]:
        """The pages in bytes as they are now, [stream][KV head][byte slot][byte]."""
        flat = self.open.get(np.uint8, (self.streams, self.rows_stream))[:, self.n_halves : -APART]
        return flat.reshape(self.streams, self.heads, self.n_bytes, -1)

    def set_byte_blocks(self, blocks: NDArray[np.uint8]) -> None:
        """Overwrites all pages in bytes."""
        for s in range(self.streams):
            self.open.set(blocks[s].reshape(-1), s * self.rows_stream + self.n_halves)

    def byte_part(self, block: NDArray[np.uint8], name: str) -> tuple[NDArray[np.int8], Halves]:
        """Bytes [PAGE][width] and parameters [2][n] of "k" or "v" of one block, as views."""
        width, n = (self.d, self.d) if name == "k" else (self.stored_e, PAGE)
        at = 0 if name == "k" else PAGE * self.d + 4 * self.d
        end = at + PAGE * width
        return block[at:end].view(np.int8).reshape(PAGE, -1), block[end : end + 4 * n].view(np.float16).reshape(2, n)

    def pages(self) -> NDArray[np.uint8]:
        """The blocks as they are now, [stream][KV head][page][byte]; poison for pages that have none."""
        assert self.blocks is not None
        flat = self.blocks.get(np.uint8, (self.streams, self.blocks_stream))[:, :-APART]
        out = np.full((self.streams, self.heads, self.n_pages, self.layout.bytes), 0xFF, np.uint8)
        out[:, :, self.first_block :] = flat.reshape(self.streams, self.heads, -1, self.layout.bytes)
        return out

    def set_pages(self, pages: NDArray[np.uint8]) -> None:
        """Overwrites all blocks."""
        assert self.blocks is not None
        gap = np.full(APART, 0xFF, np.uint8)
        pages = pages[:, :, self.first_block :]
        self.blocks.set(np.concatenate([np.concatenate([stream.reshape(-1), gap]) for stream in pages]))

    def part_at(self, name: str) -> tuple[slice, slice]:
        """Where codes, if it has its own, and parameters of "k" or "v" lie in a block, without padding."""
        side, width = (self.layer.k, self.d) if name == "k" else (self.layer.v, self.stored_e)
        n_codes, n_param = part_sizes(side, width, name == "k")
        at = [getattr(self.layout, f"{name}_{part}") for part in ("codes", "param")]
        return slice(at[0], at[0] + n_codes), slice(at[1], at[1] + n_param)

    # ---- verbs ----

    def moves(self, moves: Sequence[Move]) -> Buffer:
        return Buffer(self.device, np.array([move.words() for move in moves] or [[-9] * 9], np.int32))

    def update(
        self, seals: Sequence[Move] = (), unseals: Sequence[Move] = (), n_threads: int = 2, serial: int | None = None
    ) -> int:
        """Returns how many values were not finite.  serial: is noted when pages are sealed."""
        a = native.load()[0].new("xq_update_args *")
        lists, notes = (self.moves(seals), self.moves(unseals)), Buffer(self.device, np.array([serial or 0, 0], "<i4"))
        a.seals, a.unseals = (x.pointer("int32_t") for x in lists)
        a.n_seals, a.n_unseals = len(seals), len(unseals)
        if serial is not None:
            a.serial = notes.pointer("int32_t")
            a.done = a.serial + 1
        n_bad = self._counted(a, n_threads)
        assert serial in (None, notes.get(np.int32, (2,))[1])
        return n_bad

    def write(
        self, rows: NDArray[np.int32], new: tuple[Floats, Floats], n_threads: int = 2, *, rotate: bool = False
    ) -> int:
        """rows [token] over streams, new [token][KV head][d or e]; returns how many values were not finite."""
        a = native.load()[0].new("xq_update_args *")
        n, keep = len(rows), [Buffer(self.device, rows)]
        padded = [np.concatenate([x, np.full((*x.shape[:2], 4), np.nan, np.float32)], 2) for x in new]
        keep += [Buffer(self.device, x) for x in padded]
        a.rows, a.k_cur, a.v_cur = keep[0].pointer("int32_t"), keep[1].pointer("float"), keep[2].pointer("float")
        a.k_token_stride, a.k_head_stride = padded[0].strides[:2]
        a.v_token_stride, a.v_head_stride = padded[1].strides[:2]
        a.n_tokens, a.rotate = n, rotate
        return self._counted(a, n_threads)

    def _counted(self, args: Any, n_threads: int) -> int:
        self.nonfinite.set(np.full(1, 5, np.uint64))
        args.n_nonfinite = self.nonfinite.pointer("uint64_t")
        self.device.verb("update", self.c, args, n_threads)
        return int(self.nonfinite.get(np.uint64, (1,))[0]) - 5

    def table(self, table: Sequence[Sequence[int]], first_stream: int) -> NDArray[np.int32]:
        """[stream of the cache][n_pages] from [stream][page]; all else says what nobody may look at."""
        out = np.full((self.streams, self.n_pages), -9, np.int32)
        for s, slots in enumerate(table):
            out[first_stream + s, : len(slots)] = slots
        return out

    def attend(
        self,
        q: Floats,
        table: Sequence[Sequence[int]],
        mask: Halves | None = None,
        *,
        first_stream: int = 0,
        scale: float = 1.0,
        softcap: float = 0.0,
        max_bias: float = 0.0,
        sinks: Floats | None = None,
        n_parts: int = 1,
        n_threads: int = 2,
        rotate: bool = False,
    ) -> Floats:
        """q [stream][token][head][d], table [stream][page], mask [stream][token][cell] -> [stream][token][head][e]."""
        ffi, lib = native.load()
        n_streams, n_tokens, n_head, _ = q.shape
        a = ffi.new("xq_attend_args *")
        keep = [Buffer(self.device, x) for x in (q, self.table(table, first_stream), np.array([first_stream], "<i4"))]
        a.q, a.q_head_stride, a.q_token_stride = keep[0].pointer("float"), q.strides[2], q.strides[1]
        a.table, a.first_stream = keep[1].pointer("int32_t"), keep[2].pointer("int32_t") if first_stream else ffi.NULL
        a.n_head, a.n_tokens, a.n_streams, a.n_kv_pages = n_head, n_tokens, n_streams, len(table[0])
        if mask is not None:
            keep.append(Buffer(self.device, mask))
            a.mask = keep[-1].pointer("uint16_t")
            a.mask_stream_stride, a.mask_token_stride = mask.strides[:2]
        if sinks is not None:
            keep.append(Buffer(self.device, sinks))
            a.sinks = keep[-1].pointer("float")
        a.scale, a.softcap, a.max_bias, a.n_parts = scale, softcap, max_bias, n_parts
        a.rotate = rotate
        out = Buffer(self.device, 4 * n_streams * n_tokens * n_head * self.e)
        partial = Buffer(self.device, 4 * int(lib.xq_attend_states(self.c, a)))
        n_groups = -(-n_tokens * (n_head // self.heads) // self.device.group_rows)
        arrivals = Buffer(self.device, np.zeros(n_streams * n_groups * self.heads, np.uint32))
        a.out, a.partial, a.arrivals = out.pointer("float"), partial.pointer("float"), arrivals.pointer("uint32_t")
        self.device.verb("attend", self.c, a, n_threads)
        assert not arrivals.get(np.uint32, (arrivals.bytes // 4,)).any()
        return out.get(np.float32, (n_streams, n_tokens, n_head, self.e))

    def unpack(
        self, table: Sequence[Sequence[int]], is_k: bool, heads: slice = slice(None), *, first_stream: int = 0
    ) -> Halves:
        """[stream][KV head][cell][width] of the wanted heads."""
        ffi, _ = native.load()
        first, end, _ = heads.indices(self.heads)
        a = ffi.new("xq_unpack_args *")
        keep = [
            Buffer(self.device, self.table(table, first_stream)),
            Buffer(self.device, np.array([first_stream], "<i4")),
        ]
        shape = (len(table), len(table[0]) * PAGE, end - first, self.d if is_k else self.stored_e)
        out = Buffer(self.device, 2 * int(np.prod(shape)))
        a.table, a.first_stream, a.rows = (
            keep[0].pointer("int32_t"),
            keep[1].pointer("int32_t"),
            out.pointer("uint16_t"),
        )
        a.n_streams, a.n_kv_pages, a.is_k, a.first_head, a.n_heads = *shape[:1], len(table[0]), is_k, first, end - first
        self.device.verb("unpack", self.c, a)
        return out.get(np.float16, shape).transpose(0, 2, 1, 3)

    def read_keys(self, pages: Sequence[Move]) -> Floats:
        """[page][token][KV head][d]."""
        return self._keys("read_keys", pages, np.full((len(pages), PAGE, self.heads, self.d), np.nan, np.float32))

    def write_keys(self, pages: Sequence[Move], keys: Floats) -> None:
        """Stores keys [page][token][KV head][d] where read_keys finds them."""
        self._keys("write_keys", pages, keys)

    def _keys(self, verb: str, pages: Sequence[Move], keys: Floats) -> Floats:
        a = native.load()[0].new("xq_keys_args *")
        moves, data = self.moves(pages), Buffer(self.device, keys)
        a.pages, a.n_pages, a.keys = moves.pointer("int32_t"), len(pages), data.pointer("float")
        a.token_stride, a.head_stride = keys.strides[1:3]
        self.device.verb(verb, self.c, a)
        return data.get(np.float32, keys.shape)


def part_sizes(side: Side, width: int, is_k: bool) -> tuple[int, int]:
    """Bytes of a page's codes, its own or its owner's, and of its parameters."""
    n_i, n_j = (width, PAGE) if is_k else (PAGE, width)
    group = side.group if 0 < side.group < n_j else n_j
    n_codes = native.load()[1].xq_packed_bytes(side.bits, n_i, n_j) if side.bits else 0
    return n_codes, n_j // group * n_i * (4 if side.param == "f16" and side.bits else 2)
