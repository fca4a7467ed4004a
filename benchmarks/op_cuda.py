"""llama.cpp's own attention over an F16 cache on a GPU, as a ggml graph that is run again and again.

ggml and its CUDA backend come from our build of them (libggml-base, libggml-cuda in the package's folder of libraries).
"""

from __future__ import annotations

import statistics
import time
from functools import lru_cache
from typing import Any

import numpy as np
from cffi import FFI

from op_graph import F16, F32
from xquant_gguf import native

LIBRARIES = {"ggml-base": 0x100, "ggml-cuda": 0}  # the first with RTLD_GLOBAL: the second links to it
GGML = """
struct ggml_init_params { size_t mem_size; void *mem_buffer; bool no_alloc; };
void *ggml_init(struct ggml_init_params);
void ggml_free(void *);
void *ggml_new_tensor_4d(void *, int, int64_t, int64_t, int64_t, int64_t);
void *ggml_permute(void *, void *, int, int, int, int);
void *ggml_view_4d(void *, void *, int64_t, int64_t, int64_t, int64_t, size_t, size_t, size_t, size_t);
size_t ggml_nbytes(const void *);
void *ggml_flash_attn_ext(void *, void *, void *, void *, void *, float, float, float);
void *ggml_new_graph(void *);
void ggml_build_forward_expand(void *, void *);
void *ggml_backend_alloc_ctx_tensors(void *, void *);
void ggml_backend_buffer_free(void *);
void ggml_backend_tensor_set(void *, const void *, size_t, size_t);
int ggml_backend_graph_compute(void *, void *);
void ggml_backend_free(void *);
bool ggml_backend_supports_op(void *, const void *);
void *ggml_backend_cuda_init(int);
"""


@lru_cache(maxsize=1)
def load() -> tuple[FFI, Any, Any]:
    """cffi, libggml-base, libggml-cuda; OSError: not built."""
    ffi = FFI()
    ffi.cdef(GGML)
    return ffi, *(ffi.dlopen(str(native.library_path(name)), flag) for name, flag in LIBRARIES.items())


def available() -> bool:
    """Whether the build has llama.cpp's CUDA backend."""
    try:
        load()
    except OSError:
        return False
    return True


def fill(base: Any, ffi: FFI, tensor: Any, chunk: bytes) -> None:
    """Random numbers, the same again and again: zeros may run faster than what a cache holds."""
    n = base.ggml_nbytes(tensor)
    for at in range(0, n, len(chunk)):
        base.ggml_backend_tensor_set(tensor, ffi.from_buffer(chunk), at, min(len(chunk), n - at))


def attention_ms(
    d: int, e: int, n_head: int, n_kv: int, latent: bool, n_tokens: int, copies: int, launches: int, rounds: int
) -> float | None:
    """Median milliseconds of ggml_flash_attn_ext for one new token, over F16 keys and values of n_tokens tokens, in
    graphs of `launches` that rotate over `copies` layers.  latent: values are the first e channels of keys.  None:
    llama.cpp's CUDA backend has no kernel for the shape."""
    ffi, base, cuda = load()
    backend = cuda.ggml_backend_cuda_init(0)
    ctx = base.ggml_init(ffi.new("struct ggml_init_params *", {"mem_size": 16 << 20, "no_alloc": True})[0])
    new = base.ggml_new_tensor_4d
    q, mask = new(ctx, F32, d, 1, n_head, 1), new(ctx, F16, n_tokens, 1, 1, 1)
    key_rows = [new(ctx, F16, d, n_kv, n_tokens, 1) for _ in range(copies)]  # as llama.cpp lays them out
    if latent:
        steps = 2 * d, 2 * d * n_kv, 2 * d * n_kv * n_tokens
        value_rows = [base.ggml_view_4d(ctx, k, e, n_kv, n_tokens, 1, *steps, 0) for k in key_rows]
    else:
        value_rows = [new(ctx, F16, e, n_kv, n_tokens, 1) for _ in range(copies)]
    keys, values = ([base.ggml_permute(ctx, x, 0, 2, 1, 3) for x in rows] for rows in (key_rows, value_rows))
    graph = base.ggml_new_graph(ctx)
    for i in range(launches):
        k, v = keys[i % copies], values[i % copies]
        out = base.ggml_flash_attn_ext(ctx, q, k, v, mask, d**-0.5, 0.0, 0.0)
        if not base.ggml_backend_supports_op(backend, out):
            base.ggml_free(ctx)
            base.ggml_backend_free(backend)
            return None
        base.ggml_build_forward_expand(graph, out)
    buffer = base.ggml_backend_alloc_ctx_tensors(ctx, backend)
    rng = np.random.default_rng(0)
    chunk = rng.standard_normal(1 << 23, np.float32).astype(np.float16).tobytes()
    for tensor in key_rows if latent else key_rows + value_rows:
        fill(base, ffi, tensor, chunk)
    fill(base, ffi, q, rng.standard_normal(d * n_head, np.float32).tobytes())
    fill(base, ffi, mask, bytes(2 * n_tokens))
    times = []
    for _ in range(rounds + 2):  # the first ones warm up
        start = time.perf_counter()
        if base.ggml_backend_graph_compute(backend, graph) != 0:
            raise RuntimeError("ggml's graph failed")
        times.append((time.perf_counter() - start) / launches * 1e3)
    base.ggml_backend_buffer_free(buffer)
    base.ggml_free(ctx)
    base.ggml_backend_free(backend)
    return statistics.median(times[2:])
