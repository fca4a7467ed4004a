"""The fork's libllama: makes llama_cpp load ours, and binds what it exports beside llama.h."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cffi import FFI
from numpy.typing import NDArray

from xquant_gguf import native
from xquant_gguf.plan import Layer, Plan, Shape, side_from_c
from xquant_gguf_hook import finder


@dataclass(frozen=True)
class Page:
    """A page of a cache: its slot if it is F16, SEALED, FREE or below; cells in it; tokens written since its newest."""

    state: int
    n_cells: int
    age: int

    @property
    def is_open(self) -> bool:
        return self.state >= 0 or self.in_bytes

    @property
    def in_bytes(self) -> bool:
        return self.state < FREE


SEALED, FREE = -1, -2
_GPU = 1  # GGML_BACKEND_DEVICE_TYPE_GPU
_BUILT_FROM = native.built_from()
LLAMA_CPP_PYTHON: str = _BUILT_FROM["llama_cpp_python"]
GGML_TYPE_XQUANT: int = _BUILT_FROM["ggml_type"]


def use() -> None:
    """Makes `import llama_cpp` load the fork; ImportError if another library or version is in the way."""
    ours = native.library_path("llama").parent
    loaded = sys.modules.get("llama_cpp.llama_cpp")
    if loaded is not None:
        path = Path(loaded._lib._name)
        if not (path.exists() and path.parent.samefile(ours)):
            raise ImportError(
                f"llama_cpp was imported before xquant_gguf and has loaded {path}, since {finder.reason}; xquant_gguf "
                f"needs the libraries in {ours}: import xquant_gguf before anything that imports llama_cpp"
            )
    found = version("llama-cpp-python")
    if found != LLAMA_CPP_PYTHON:
        raise ImportError(
            f"llama-cpp-python is {found}; the fork is built from {LLAMA_CPP_PYTHON}, whose bindings must match it "
            f"exactly: pip install llama-cpp-python=={LLAMA_CPP_PYTHON}"
        )
    finder.insist(str(ours))


GGML = """
const char * ggml_type_name(int type);
int64_t ggml_blck_size(int type);
size_t ggml_type_size(int type);
void * ggml_backend_reg_by_name(const char * name);
void * ggml_backend_reg_get_proc_address(void * reg, const char * name);
size_t ggml_backend_reg_dev_count(void * reg);
void * ggml_backend_reg_dev_get(void * reg, size_t index);
size_t ggml_backend_dev_count(void);
void * ggml_backend_dev_get(size_t index);
int ggml_backend_dev_type(void * device);
void ggml_backend_dev_memory(void * device, size_t * free, size_t * total);
"""
"""What we need of ggml beside the bindings of llama_cpp."""


class _Libraries:
    """Several libraries as one: what one lacks, the next has."""

    def __init__(self, *libraries: Any) -> None:
        self._libraries = libraries

    def __getattr__(self, name: str) -> Any:
        for library in self._libraries:
            with suppress(AttributeError):
                found = getattr(library, name)
                setattr(self, name, found)
                return found
        raise AttributeError(name)


@lru_cache(maxsize=1)
def load() -> tuple[FFI, Any]:
    """The cffi instance, and libllama with what it is linked to: the same libraries that llama_cpp has loaded."""
    ffi = FFI()
    ffi.cdef(GGML)
    for header in ("xquant.h", "xquant_llama.h"):
        ffi.cdef(native.declarations(native.LIBRARY_DIR / header))
    # on Windows a library has its own names alone
    return ffi, _Libraries(*(native.open_library(ffi, name) for name in ("llama", "ggml", "ggml-base", "xquant")))


class GgmlType(NamedTuple):
    """A type of tensor: its number, and the values and bytes of a block."""

    number: int
    values: int
    bytes: int


def ggml_types() -> dict[str, GgmlType]:
    """All types of ggml by name, ours the last; ImportError if its number is another one than we were told."""
    ffi, lib = load()
    found: dict[str, GgmlType] = {}
    for i in range(GGML_TYPE_XQUANT + 1):
        name = ffi.string(lib.ggml_type_name(i)).decode()
        found[name] = GgmlType(i, int(lib.ggml_blck_size(i)), int(lib.ggml_type_size(i)))
    if found.get("xquant") != GgmlType(GGML_TYPE_XQUANT, 0, 0):
        raise ImportError(f"{native.library_path('llama')} has no cache type xquant of number {GGML_TYPE_XQUANT}")
    return found


def gpus() -> list[Any]:
    """ggml's devices that are GPUs of this machine."""
    _, lib = load()
    devices = [lib.ggml_backend_dev_get(i) for i in range(lib.ggml_backend_dev_count())]
    return [device for device in devices if lib.ggml_backend_dev_type(device) == _GPU]


def cpu_variant() -> str:
    """Which build of llama.cpp's CPU kernels runs, for which instructions; ValueError if none can."""
    ffi, lib = load()
    problem = ffi.new("const char **")
    name = lib.xquant_llama_cpu_variant(problem)
    if name == ffi.NULL:
        raise ValueError(ffi.string(problem[0]).decode())
    return str(ffi.string(name).decode())


def error() -> str:
    """Why the last context with an XQuant cache could not be created on this thread; empty if it could."""
    ffi, lib = load()
    return str(ffi.string(lib.xquant_llama_error()).decode())


def _context(ctx: Any) -> Any:
    """A llama_cpp context (ctypes pointer or address) as a cffi pointer."""
    ffi, _ = load()
    address = ctx if isinstance(ctx, int) else ctypes.cast(ctx, ctypes.c_void_p).value
    return ffi.cast("struct llama_context *", address)


class QueryMoments:
    """Second moments of the queries of a context's layers, summed over tokens and the query heads of a KV head.

    sums: [KV head][d][d], by model layer.  Layers of an XQuant cache on the CPU alone.
    """

    def __init__(self, shapes: Mapping[int, Shape]) -> None:
        """shapes: of the layers that are looked at, by their number in the model."""
        ffi, _ = load()
        self.sums = {i: np.zeros((shape.heads, shape.d, shape.d)) for i, shape in shapes.items()}
        self._moments = ffi.new("xquant_llama_moments *")
        for i, sums in self.sums.items():
            self._moments.sums[i] = ffi.cast("double *", sums.ctypes.data)

    def watch(self, params: Any) -> None:
        """Makes a context with these parameters, which must not outlive this, add up its queries."""
        ffi, lib = load()
        params.cb_eval = type(params.cb_eval)(int(ffi.cast("uintptr_t", lib.xquant_llama_add_moments)))
        params.cb_eval_user_data = int(ffi.cast("uintptr_t", self._moments))

    def stop(self) -> None:
        """What is decoded from now on is not added."""
        for i in self.sums:
            self._moments.sums[i] = load()[0].NULL


def info(ctx: Any) -> dict[str, Any] | None:
    """Fields of xquant_llama_info (native/llama/xquant_llama.h); None if the context has no XQuant cache."""
    ffi, lib = load()
    out = ffi.new("xquant_llama_info *")
    if lib.xquant_llama_get_info(_context(ctx), out) != 0:
        return None
    return {name: getattr(out, name) for name, _ in ffi.typeof("xquant_llama_info").fields}


def shapes(ctx: Any) -> tuple[list[Shape], int]:
    """Shapes of all model layers (heads 0: no keys and values), and the bytes of the context's cache, of any type."""
    ffi, lib = load()
    d, e, heads = (ffi.new("int32_t[XQ_MAX_LAYERS]") for _ in range(3))
    size = ffi.new("int64_t *")
    n = lib.xquant_llama_get_shapes(_context(ctx), d, e, heads, size)
    return [Shape(d[i], e[i], heads[i]) for i in range(max(n, 0))], int(size[0])


def compute_bytes(ctx: Any) -> int:
    """Bytes of the buffers in which a context computes, the largest micro-batch's, whatever its cache."""
    return int(load()[1].xquant_llama_get_compute_bytes(_context(ctx)))


@contextmanager
def plan_provider(give: Callable[[list[Shape]], bytes]) -> Iterator[None]:
    """While it is open, XQuant caches made on this thread follow the plans that `give` returns, as GGUF blocks.

    give: called with the shapes of all model layers (heads 0: not in the cache) when a cache is made; what it raises is
    raised when the context closes.
    """
    ffi, lib = load()
    blocks, errors = [], []

    @ffi.callback("xquant_llama_plan_fn")  # type: ignore[untyped-decorator]
    def asked(_: Any, n: int, d: Any, e: Any, heads: Any, block: Any, size: Any) -> int:
        try:
            blocks.append(ffi.from_buffer(give([Shape(d[i], e[i], heads[i]) for i in range(n)])))
        except Exception as error:  # raised below: it cannot pass through C
            errors.append(error)
            return -1
        block[0], size[0] = blocks[-1], len(blocks[-1])
        return 1

    lib.xquant_llama_set_plan_provider(asked, ffi.NULL)
    try:
        yield
    except ValueError:
        if not errors:
            raise
    finally:
        lib.xquant_llama_set_plan_provider(ffi.NULL, ffi.NULL)
    if errors:
        raise errors[0]


def pages(ctx: Any, stream: int = 0) -> list[Page]:
    """The pages of a stream of a context's XQuant cache."""
    ffi, lib = load()
    n = lib.xquant_llama_get_pages(_context(ctx), stream, 0, ffi.NULL)
    if n < 0:
        raise ValueError(f"stream {stream}: the context has no XQuant cache with such a stream")
    out = ffi.new("xquant_llama_page[]", max(n, 1))
    lib.xquant_llama_get_pages(_context(ctx), stream, n, out)
    return [Page(out[i].state, out[i].n_cells, out[i].age) for i in range(n)]


def read_rows(ctx: Any, layer: int, name: str, head: int, n_cells: int, width: int) -> NDArray[np.float16]:
    """F16 keys or values (name: "k" or "v") [cell][width] of a model layer's KV head, in a cache that never seals."""
    ffi, lib = load()
    out = np.empty((n_cells, width), np.float16)
    pointer = ffi.from_buffer("uint16_t[]", out)
    if lib.xquant_llama_read_rows(_context(ctx), layer, int(name == "v"), head, n_cells, pointer) != 0:
        raise ValueError(f"layer {layer}, {name}: head {head} has no {n_cells} open cells")
    return out


def write_rows(ctx: Any, layer: int, name: str, head: int, rows: NDArray[np.float16]) -> None:
    """Replaces the rows of the first cells that read_rows gives."""
    ffi, lib = load()
    pointer = ffi.from_buffer("uint16_t[]", np.ascontiguousarray(rows, np.float16))
    if lib.xquant_llama_write_rows(_context(ctx), layer, int(name == "v"), head, len(rows), pointer) != 0:
        raise ValueError(f"layer {layer}, {name}: head {head} has no {len(rows)} open cells")


def layers(ctx: Any) -> tuple[list[Shape], list[int], int]:
    """Shapes and model numbers of the layers in a context's XQuant cache, and the number of layers of the model."""
    found = plan(ctx, "xquant")
    assert found is not None
    return found[1], found[2], len(shapes(ctx)[0])


def plan(ctx: Any, preset: str) -> tuple[Plan, list[Shape], list[int]] | None:
    """Plan in force, shapes and model layer numbers of the layers in the XQuant cache; None if there is none."""
    ffi, lib = load()
    c, arrays = ffi.new("xq_plan *"), [ffi.new("int32_t[XQ_MAX_LAYERS]") for _ in range(3)]
    if lib.xquant_llama_get_plan(_context(ctx), c, *arrays) != 0:
        return None
    d, e, heads = arrays
    held = [i for i in range(c.n_layers) if d[i] > 0]

    layers = tuple(Layer(*(side_from_c(s, held.index) for s in (c.layers[i].k, c.layers[i].v))) for i in held)
    return (
        Plan(preset, layers, c.window, c.pinned, open_bits=c.open_bits),
        [Shape(d[i], e[i], heads[i]) for i in held],
        held,
    )
