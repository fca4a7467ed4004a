"""One layer of a cache on a GPU, as the CUDA kernels see it: for the tests and benchmarks of libxquant_cuda."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from cffi import FFI
from numpy.typing import NDArray

from xquant_gguf import native
from xquant_gguf.plan import PAGE, Layer, Side, side_to_c

HEADER = Path(__file__).resolve().parent.parent.parent / "native" / "cuda" / "xquant_cuda.h"
SEALED, FREE = -1, -2


@lru_cache(maxsize=1)
def driver() -> Any:
    """The CUDA driver, with the primary context of device 0 current."""
    cuda = ctypes.CDLL("libcuda.so.1")
    context, device = ctypes.c_void_p(), ctypes.c_int()
    check(cuda.cuInit(0))
    check(cuda.cuDeviceGet(ctypes.byref(device), 0))
    check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    check(cuda.cuCtxSetCurrent(context))
    return cuda


def check(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"the CUDA driver returned {status}")


@lru_cache(maxsize=1)
def available() -> bool:
    try:
        driver()
        native.library_path("xquant_cuda")
    except (OSError, RuntimeError):
        return False
    return True


def count() -> int:
    """GPUs of this machine."""
    n = ctypes.c_int()
    check(driver().cuDeviceGetCount(ctypes.byref(n)))
    return n.value


@lru_cache(maxsize=1)
def load() -> tuple[FFI, Any]:
    ffi = FFI()
    ffi.cdef(native.declarations(native.LIBRARY_DIR / "xquant.h") + native.declarations(HEADER))
    return ffi, ffi.dlopen(str(native.library_path("xquant_cuda")))


def call(name: str, *args: Any) -> None:
    """Calls a function of libxquant_cuda; RuntimeError with its message if it fails."""
    ffi, lib = load()
    if getattr(lib, name)(*args) != 0:
        raise RuntimeError(f"{name}: {ffi.string(lib.xq_cuda_error()).decode()}")


class Graph:
    """What `work(stream)` enqueues, captured once: replays cost the host next to nothing."""

    def __init__(self, work: Callable[[Any], None]) -> None:
        cuda, ffi = driver(), load()[0]
        self.stream, graph, self.graph = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        check(cuda.cuStreamCreate(ctypes.byref(self.stream), 1))  # does not wait for the default stream
        check(cuda.cuStreamBeginCapture_v2(self.stream, 2))  # relaxed
        work(ffi.cast("void *", self.stream.value))
        check(cuda.cuStreamEndCapture(self.stream, ctypes.byref(graph)))
        check(cuda.cuGraphInstantiateWithFlags(ctypes.byref(self.graph), graph, ctypes.c_ulonglong(0)))

    def milliseconds(self) -> float:
        """Time of one replay."""
        cuda, events, out = driver(), [ctypes.c_void_p() for _ in range(2)], ctypes.c_float()
        for event in events:
            check(cuda.cuEventCreate(ctypes.byref(event), 0))
        check(cuda.cuEventRecord(events[0], self.stream))
        check(cuda.cuGraphLaunch(self.graph, self.stream))
        check(cuda.cuEventRecord(events[1], self.stream))
        check(cuda.cuEventSynchronize(events[1]))
        check(cuda.cuEventElapsedTime(ctypes.byref(out), *events))
        for event in events:
            check(cuda.cuEventDestroy_v2(event))
        return out.value


def synchronize() -> None:
    check(driver().cuCtxSynchronize())


class Buffer:
    """Memory of the GPU, filled from an array or with poison."""

    def __init__(self, content: NDArray[Any] | int) -> None:
        self.bytes = content if isinstance(content, int) else content.nbytes
        pointer = ctypes.c_uint64()
        check(driver().cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(max(self.bytes, 16))))
        self.at = pointer.value
        if isinstance(content, int):
            check(driver().cuMemsetD8_v2(ctypes.c_uint64(self.at), ctypes.c_ubyte(0xFF), ctypes.c_size_t(self.bytes)))
        else:
            self.set(content)

    def set(self, content: NDArray[Any]) -> None:
        data = np.ascontiguousarray(content)
        assert data.nbytes == self.bytes
        check(driver().cuMemcpyHtoD_v2(ctypes.c_uint64(self.at), data.ctypes.data_as(ctypes.c_void_p), data.nbytes))

    def get(self, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        synchronize()
        out = np.empty(shape, dtype)
        assert out.nbytes <= self.bytes
        check(driver().cuMemcpyDtoH_v2(out.ctypes.data_as(ctypes.c_void_p), ctypes.c_uint64(self.at), out.nbytes))
        return out

    def pointer(self, kind: str) -> Any:
        return load()[0].cast(kind + " *", self.at)

    def __del__(self) -> None:
        if hasattr(self, "at"):
            driver().cuMemFree_v2(ctypes.c_uint64(self.at))


def layout_of(layer: Layer, d: int, e: int) -> Any:
    """xq_block_layout by libxquant."""
    ffi, lib = native.load()
    c, out = ffi.new("xq_layer *"), ffi.new("xq_block_layout *")
    side_to_c(c.k, layer.k, "K")
    side_to_c(c.v, layer.v, "V")
    assert lib.xq_block_layout_of(c, d, e, out) == 0
    return out[0]


class DeviceLayer:
    """Storage of one stream of one layer: blocks poisoned, window given.

    window: K [head][slot][PAGE][d], V [head][slot][PAGE][e], F16.  owner: the layer whose codes are read.
    source, map: the layer and [head][e][e] that predict V, with the heads it reads.
    """

    def __init__(
        self,
        layer: Layer,
        window: tuple[NDArray[np.float16], NDArray[np.float16]],
        n_pages: int,
        owner: DeviceLayer | None = None,
        source: DeviceLayer | None = None,
        map_: tuple[NDArray[np.int32], NDArray[np.float32]] | None = None,
    ) -> None:
        ffi, _ = load()
        k, v = window
        self.layer, self.n_pages, self.source, self.map = layer, n_pages, source, map_
        self.heads, self.slots, _, self.d = k.shape
        self.e = v.shape[-1]
        self.layout = layout_of(layer, self.d, self.e)
        self.owner = owner or self
        self.blocks = Buffer(self.heads * n_pages * self.layout.bytes)
        self.window = Buffer(np.concatenate([k.reshape(-1), v.reshape(-1)]))
        self.nonfinite = Buffer(np.zeros(1, np.uint64))
        c = self.c = ffi.new("xq_cuda_layer *")
        c.d, c.e, c.n_head_kv, c.n_pages, c.n_slots = self.d, self.e, self.heads, n_pages, self.slots
        side_to_c(c.plan.k, layer.k, "K")
        side_to_c(c.plan.v, layer.v, "V")
        for name, layout in (("own", self.layout), ("k_owner", self.owner.layout), ("v_owner", self.owner.layout)):
            for field in ("k_codes", "k_param", "v_codes", "v_param", "bytes"):
                setattr(getattr(c, name), field, getattr(layout, field))
        c.blocks = self.blocks.pointer("uint8_t")
        c.k_blocks = c.v_blocks = self.owner.blocks.pointer("uint8_t")
        c.window = self.window.pointer("uint16_t")
        if source is not None and map_ is not None:
            c.mapped = 1
            side_to_c(c.source, source.layer.v, "source")
            for field in ("k_codes", "k_param", "v_codes", "v_param", "bytes"):
                setattr(c.source_layout, field, getattr(source.layout, field))
            c.source_blocks = source.blocks.pointer("uint8_t")
            self._map = [Buffer(x) for x in map_]
            c.map_heads, c.map = self._map[0].pointer("int32_t"), self._map[1].pointer("float")

    def update(
        self,
        seals: list[tuple[int, int, NDArray[np.bool_]]] | None = None,
        unseals: list[tuple[int, int]] | None = None,
        rows: NDArray[np.int32] | None = None,
        new: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
    ) -> None:
        """seals: page, slot, valid [PAGE].  unseals: page, slot.  rows [token] of the window; new: [token][head][d]."""
        if unseals is None:
            unseals = []
        if seals is None:
            seals = []
        ffi, _ = load()
        words = [[0, p, s, *np.packbits(v, bitorder="little").view("<i4").tolist()] for p, s, v in seals] or [[0] * 7]
        n = 0 if rows is None else len(rows)
        head = Buffer(np.array([len(seals), len(unseals)], np.int32))
        lists = Buffer(np.array(words, np.int32)), Buffer(np.array([[0, *u] for u in unseals] or [[0] * 3], np.int32))
        a = ffi.new("xq_cuda_update_args *")
        a.n_seal, a.n_unseal = head.pointer("int32_t"), head.pointer("int32_t") + 1
        a.seals, a.unseals = lists[0].pointer("int32_t"), lists[1].pointer("int32_t")
        a.n_nonfinite, a.n_tokens = self.nonfinite.pointer("unsigned long long"), n
        keep = []
        if rows is not None and new is not None:
            keep = [Buffer(rows), *map(Buffer, new)]
            a.rows, a.k_cur, a.v_cur = keep[0].pointer("int32_t"), keep[1].pointer("float"), keep[2].pointer("float")
            a.k_head_stride, a.v_head_stride = 4 * self.d, 4 * self.e
            a.k_token_stride, a.v_token_stride = 4 * self.d * self.heads, 4 * self.e * self.heads
        call("xq_cuda_update", self.c, a, ffi.NULL)
        synchronize()

    def block(self, head: int, page: int) -> NDArray[np.uint8]:
        """One sealed page."""
        return self.blocks.get(np.uint8, (self.heads, self.n_pages, self.layout.bytes))[head, page]

    def rows(self) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        """The window as it is now."""
        flat = self.window.get(np.float16, (self.heads * self.slots * PAGE * (self.d + self.e),))
        n = self.heads * self.slots * PAGE * self.d
        shape = self.heads, self.slots, PAGE
        return flat[:n].reshape(*shape, self.d), flat[n:].reshape(*shape, self.e)

    def attend(
        self,
        q: NDArray[np.float32],
        table: list[int],
        mask: NDArray[np.float16] | None = None,
        scale: float = 1.0,
        softcap: float = 0.0,
        sinks: NDArray[np.float32] | None = None,
        n_parts: int = 3,
    ) -> NDArray[np.float32]:
        """q [token][head][d], mask [token][cell] -> [token][head][e]."""
        ffi, _ = load()
        n_tokens, n_head, _ = q.shape
        a = ffi.new("xq_cuda_attend_args *")
        keep = [Buffer(q), Buffer(np.array(table, np.int32)), Buffer(np.zeros(1, np.int32))]
        a.q, a.q_head_stride, a.q_token_stride = keep[0].pointer("float"), 4 * self.d, 4 * self.d * n_head
        if mask is not None:
            keep.append(Buffer(mask))
            a.mask, a.mask_token_stride = keep[-1].pointer("uint16_t"), mask.strides[0]
        a.table, a.first_stream = keep[1].pointer("int32_t"), keep[2].pointer("int32_t")
        a.n_head, a.n_tokens, a.n_streams, a.n_kv_pages = n_head, n_tokens, 1, len(table)
        a.scale, a.softcap, a.n_parts = scale, softcap, n_parts
        width = (3 if self.c.mapped else 2) * self.e + 2
        partial, out = Buffer(n_parts * n_tokens * n_head * width * 4), Buffer(n_tokens * n_head * self.e * 4)
        n_tiles = (n_tokens * n_head // self.heads + 7) // 8
        arrivals = Buffer(np.zeros(n_tiles * self.heads, np.uint32))
        a.partial, a.arrivals, a.out = partial.pointer("float"), arrivals.pointer("uint32_t"), out.pointer("float")
        if sinks is not None:
            keep.append(Buffer(sinks))
            a.sinks = keep[-1].pointer("float")
        call("xq_cuda_attend", self.c, a, ffi.NULL)
        assert not arrivals.get(np.uint32, (n_tiles * self.heads,)).any()
        return out.get(np.float32, (n_tokens, n_head, self.e))

    def unpack(self, table: list[int], is_k: bool, first: int = 0, n: int = 0) -> NDArray[np.float16]:
        """[head][cell][width] of n heads from the first on (0: of all)."""
        n = n or self.heads
        ffi, _ = load()
        width = self.d if is_k else self.e
        a = ffi.new("xq_cuda_unpack_args *")
        keep = [Buffer(np.array(table, np.int32)), Buffer(np.zeros(1, np.int32))]
        out = Buffer(n * len(table) * PAGE * width * 2)
        a.table, a.first_stream = keep[0].pointer("int32_t"), keep[1].pointer("int32_t")
        a.n_streams, a.n_kv_pages, a.is_k, a.rows = 1, len(table), int(is_k), out.pointer("uint16_t")
        a.first_head, a.n_heads = first, n
        call("xq_cuda_unpack", self.c, a, ffi.NULL)
        return out.get(np.float16, (len(table) * PAGE, n, width)).transpose(1, 0, 2)

    def read_keys(self, pages: list[tuple[int, int]]) -> NDArray[np.float32]:
        """pages: page, slot or SEALED -> [page][token][head][d]."""
        return self._shift("xq_cuda_read_keys", pages, np.full((len(pages), PAGE, self.heads, self.d), np.nan, "<f4"))

    def write_keys(
        self, pages: list[tuple[int, int]], keys: NDArray[np.float32], valid: NDArray[np.bool_] | None = None
    ) -> None:
        """keys [page][token][head][d] stored where read_keys finds them; valid [PAGE], of all pages alike."""
        self._shift("xq_cuda_write_keys", pages, keys, valid)

    def _shift(
        self, name: str, pages: list[tuple[int, int]], keys: NDArray[np.float32], valid: NDArray[np.bool_] | None = None
    ) -> NDArray[np.float32]:
        ffi, _ = load()
        bits = np.packbits(np.ones(PAGE, bool) if valid is None else valid, bitorder="little").view("<i4").tolist()
        words, data = Buffer(np.array([[0, *page, *bits] for page in pages], np.int32)), Buffer(keys)
        a = ffi.new("xq_cuda_shift_args *")
        a.pages, a.keys, a.n_pages = words.pointer("int32_t"), data.pointer("float"), len(pages)
        a.head_stride, a.token_stride = 4 * self.d, 4 * self.d * self.heads
        call(name, self.c, a, ffi.NULL)
        return data.get(np.float32, keys.shape)


__all__ = ["FREE", "SEALED", "Buffer", "DeviceLayer", "Layer", "Side", "available", "call", "count", "driver", "load"]
