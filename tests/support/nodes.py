"""Nodes of native/llama/node.h as whoever sends a graph to a worker could make them: every field can be set.

Tensors are plain structures over numpy arrays, which nothing else of ggml looks at.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import numpy as np
from cffi import FFI
from numpy.typing import NDArray

from xquant_gguf import native

DECLARATIONS = """
struct ggml_tensor {
    int32_t type; void * buffer; int64_t ne[4]; size_t nb[4]; int32_t op; int32_t op_params[16]; int32_t flags;
    struct ggml_tensor * src[10]; struct ggml_tensor * view_src; size_t view_offs; void * data; char name[64];
    void * extra; char padding[8];
};
typedef struct { uint8_t bits, group, fit, flags; float eta; } packed_side;
typedef struct {
    packed_side k, v, source;
    uint16_t d, e, n_head_kv, other_codes, other_param, latent, flags, other_heads;
    int32_t n_pages, n_bytes, number;
    float scale, softcap, max_bias;
} node_params;
bool xquant_compute_cpu(const struct ggml_tensor * node, int ith, int nth);
int64_t xquant_prompt_scratch(const void * cuda, const struct ggml_tensor * node);
bool xquant_prompt(const void * cuda, const struct ggml_tensor * node, void * scratch, void * cuda_stream);
const char * ggml_op_name(int32_t op);
"""
F32, F16, I8, I32 = 0, 1, 24, 26
DTYPES = {F32: np.float32, F16: np.float16, I8: np.int8, I32: np.int32}

PAGE, HEADS, PAGES, SLOTS, STREAMS, D, E, TOKENS, REP = 128, 2, 3, 2, 2, 64, 32, 2, 2
STAGED = 2  # slots of the stage
IN_BYTES = 1  # byte slots
SOURCE_HEADS = 3  # of the layer that a map reads
BORROWED, MAPPED = 4, 8
SEALED, NONE, BYTES = -1, -2, -3


@cache
def load() -> tuple[FFI, Any]:
    """The cffi instance and libggml-base."""
    ffi = FFI()
    ffi.cdef(DECLARATIONS)
    return ffi, ffi.dlopen(str(native.library_path("ggml-base")))


@cache
def operation(name: str) -> int:
    ffi, lib = load()
    numbers = (op for op in range(200) if ffi.string(lib.ggml_op_name(op)).decode() == f"XQUANT_{name}")
    return next(numbers)


class Tensor:
    """A tensor without gaps; c: its structure, array: its memory."""

    def __init__(self, kind: int, ne: list[int], values: NDArray[Any] | None = None) -> None:
        ffi, _ = load()
        shape = [*ne, *[1] * (4 - len(ne))]
        self.memory = np.zeros(int(np.prod(shape)) * np.dtype(DTYPES[kind]).itemsize + 64, np.uint8)
        start = -self.memory.ctypes.data % 64
        self.array = self.memory[start : len(self.memory) - 64 + start].view(DTYPES[kind]).reshape(shape[::-1])
        if values is not None:
            self.array.reshape(-1)[: values.size] = values.reshape(-1)
        self.c = ffi.new("struct ggml_tensor *")
        self.c.type, self.c.ne, self.c.data = kind, shape, ffi.cast("void *", self.array.ctypes.data)
        nb = np.dtype(DTYPES[kind]).itemsize
        for i, n in enumerate(shape):
            self.c.nb[i] = nb
            nb *= n


def side(bits: int, group: int, flags: int = 0) -> tuple[int, int, int, int, float]:
    """packed_side: min and max as codes' ends, parameters in F16."""
    return bits, group // 32, 1, flags, 0.1


def aux(map_heads: NDArray[np.int32] | None = None) -> Tensor:
    """As node.h lays it out; with a map whose weights are 0.01."""
    heads_end = 64 + 64
    map_at = heads_end + -(-STREAMS * 8 * HEADS * 4 // 64) * 64
    weights = HEADS * E * E * 4 if map_heads is not None else 0
    out = Tensor(I8, [map_at + weights])
    flat = out.array.reshape(-1)
    if map_heads is not None:
        flat[64 : 64 + 4 * HEADS] = map_heads.view(np.int8)
        flat[map_at:].view(np.float32)[:] = 0.01
    return out


def block_bytes(k: tuple[Any, ...], v: tuple[Any, ...]) -> int:
    """Of one page and KV head."""
    ffi, lib = native.load()
    layer, layout = ffi.new("xq_layer *"), ffi.new("xq_block_layout *")
    for name, packed in (("k", k), ("v", v)):
        one = getattr(layer, name)
        one.bits, one.group, one.fit, _, one.eta = packed[0], packed[1] * 32, packed[2], 0, packed[4]
        one.owner, one.source = (0 if packed[3] & BORROWED else -1), (0 if packed[3] & MAPPED else -1)
    assert lib.xq_block_layout_of(layer, D, E, layout) == 0
    return int(layout.bytes)


class Node:
    """A node that is accepted: of one of eight kinds, of a layer of one of three.

    kind: rows, staged, moves, clear, attend, unpack, read_keys, write_keys.  layer: own (codes of its own), borrows
    (K's and V's codes are another layer's), mapped (V is predicted from another's).
    """

    SOURCES: ClassVar[dict[str, tuple[str | None, ...]]] = {
        "rows": ("rows", "input", None, "k_cur", "v_cur", "blocks", "k_other", "v_other", "aux"),
        "staged": ("rows", "input", None, "k_cur", "v_cur", "blocks", "k_other", "v_other", "aux"),
        "moves": ("rows", None, "moves", None, None, "blocks", "k_other", "v_other", "aux"),
        "clear": ("rows", "input", "cleared", None, None, "blocks", "k_other", "v_other", "aux", "stage"),
        "attend": ("q", "input", "mask", "rows", "blocks", "k_other", "v_other", "aux", "sinks", "stage"),
        "unpack": ("input", "rows", "blocks", "k_other", "v_other", "aux", "stage"),
        "read_keys": ("pages", "rows", "blocks", "k_other", "v_other", "aux"),
        "write_keys": ("pages", "rows", "blocks", "k_other", "v_other", "aux", "keys"),
    }
    OPERATIONS: ClassVar[dict[str, str]] = dict.fromkeys(("rows", "staged", "moves", "clear"), "UPDATE")

    def __init__(self, kind: str, layer: str = "own") -> None:
        ffi, _ = load()
        rng = np.random.default_rng(0)
        self.kind, self.layer = kind, layer
        flags = {"own": 0, "borrows": BORROWED, "mapped": 0}[layer]
        k, v = side(2, 64, flags), side(3, 32, MAPPED if layer == "mapped" else flags)
        own = side(2, 64), side(3, 32)
        per_block, other = block_bytes(k, v), block_bytes(*own)
        a_stream = HEADS * PAGES

        def numbers(*ne: int) -> NDArray[Any]:
            return rng.standard_normal(int(np.prod(ne))).astype(np.float32)

        moves = np.array([[0, 0, 0, NONE, *[-1] * 4, BYTES], [1, 1, 1, NONE, *[-1] * 5]], np.int32)
        cleared = np.array([[0, 0, 0, SLOTS, *[-1] * 4, BYTES], [0, 0, NONE, NONE, 0, 0, 0, 0, -1]], np.int32)
        keys = moves.copy()
        keys[1, 2] = SEALED
        n_slot = PAGE * (D + E) * HEADS
        n_row = SLOTS * n_slot + IN_BYTES * HEADS * (PAGE * (D + E) + 4 * (D + PAGE)) // 2
        table = [0, BYTES, SEALED, NONE, 1, SLOTS if "stage" in self.SOURCES[kind] else 0]
        row = (STREAMS * SLOTS + (STAGED if kind == "staged" else 0)) * PAGE - 1
        made: dict[str, Tensor | None] = {
            "rows": Tensor(F16, [n_row, STREAMS], numbers(n_row, STREAMS).astype(np.float16)),
            "blocks": Tensor(I8, [a_stream * per_block, STREAMS]),
            "k_other": Tensor(I8, [a_stream * other, STREAMS]) if layer == "borrows" else None,
            "v_other": Tensor(I8, [PAGES * (SOURCE_HEADS if layer == "mapped" else HEADS) * other, STREAMS])
            if layer != "own"
            else None,
            "aux": aux(np.array([1, 0], np.int32) if layer == "mapped" else None),
            "input": Tensor(I32, [4 + STREAMS * PAGES + TOKENS], np.array([0] * 4 + table + [0, row])),
            "k_cur": Tensor(F32, [D, HEADS, TOKENS], numbers(D, HEADS, TOKENS)),
            "v_cur": Tensor(F32, [E, HEADS, TOKENS], numbers(E, HEADS, TOKENS)),
            "moves": Tensor(I32, [9, 2], moves),
            "cleared": Tensor(I32, [9, 2], cleared),
            "stage": Tensor(F16, [STAGED * n_slot], numbers(STAGED * n_slot).astype(np.float16)),
            "pages": Tensor(I32, [9, 2], keys),
            "q": Tensor(F32, [D, HEADS * REP, TOKENS * STREAMS], numbers(D, HEADS * REP, TOKENS * STREAMS)),
            "mask": Tensor(F16, [PAGES * PAGE, TOKENS, 1, STREAMS]),
            "sinks": Tensor(F32, [HEADS * REP]),
            "keys": Tensor(F32, [D, HEADS, 2 * PAGE], numbers(D, HEADS, 2 * PAGE)),
        }
        there = {name: tensor for name, tensor in made.items() if tensor}
        self.tensors = {name: there[name] for name in self.SOURCES[kind] if name in there}
        n_rows, state = HEADS * REP * TOKENS * STREAMS, (3 if layer == "mapped" else 2) * E + 2
        results = {
            "attend": (F32, [n_rows * (E + 2 * state)]), "unpack": (F16, [D, HEADS, PAGES * PAGE, STREAMS]),
            "read_keys": (F32, [D, HEADS, 2 * PAGE]), "write_keys": (F32, [1]), "staged": (F16, [STAGED * n_slot]),
        }  # fmt: skip
        self.tensors["result"] = Tensor(*results[kind]) if kind in results else Tensor(F16, [n_row, STREAMS])
        self.c = self.tensors["result"].c
        self.c.op = operation(self.OPERATIONS.get(kind, kind.upper()))
        self.params = ffi.new("node_params *")
        p = self.params
        p.k, p.v, p.source = k, v, (own[1] if layer == "mapped" else side(0, 0))
        p.d, p.e, p.n_head_kv, p.n_pages, p.n_bytes, p.scale = D, E, HEADS, PAGES, IN_BYTES, 0.1
        p.other_codes = p.other_param = 0xFFFF
        if layer != "own":
            p.other_heads = HEADS if layer == "borrows" else SOURCE_HEADS
            p.other_codes = block_bytes(own[0], side(0, 32)) // 64 - 4  # 0 bits: 256 bytes of means of V
            p.other_param = p.other_codes + 3 * PAGE * E // 8 // 64
        p.number = {"attend": 2, "moves": 1, "clear": 2}.get(kind, 0)
        p.flags = 1 if kind in ("unpack", "staged") else 0
        for i, name in enumerate(self.SOURCES[kind]):
            self.c.src[i] = self.tensors[name].c if name in self.tensors else ffi.NULL

    def source(self, name: str, value: Any) -> None:
        """Sets a source by its name."""
        self.c.src[self.SOURCES[self.kind].index(name)] = value

    def run(self) -> bool:
        """Whether two threads, one after the other, ran it: both, or none."""
        ffi, lib = load()
        ffi.memmove(self.c.op_params, self.params, ffi.sizeof("node_params"))
        first, second = (lib.xquant_compute_cpu(self.c, i, 2) for i in range(2))
        assert first == second
        return bool(first)
