"""Single operations of llama.cpp's CPU backend, and ours beside them, as ggml graphs that are run again and again.

ggml comes from our own build of it, as every front end of the fork uses it; its kernels are those that
`xquant-gguf inspect` names.  Our operations are nodes of graph_nodes.c, which needs a C compiler.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from cffi import FFI
from numpy.typing import NDArray

from xquant_gguf import native

NODES = Path(__file__).parent / "graph_nodes.c"
F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8  # of enum ggml_type
GGML = """
struct ggml_init_params { size_t mem_size; void *mem_buffer; bool no_alloc; };
void *ggml_init(struct ggml_init_params);
void ggml_free(void *);
void *ggml_new_tensor_4d(void *, int, int64_t, int64_t, int64_t, int64_t);
void *ggml_permute(void *, void *, int, int, int, int);
void *ggml_view_4d(void *, void *, int64_t, int64_t, int64_t, int64_t, size_t, size_t, size_t, size_t);
void *ggml_get_data(const void *);
size_t ggml_nbytes(const void *);
void *ggml_flash_attn_ext(void *, void *, void *, void *, void *, float, float, float);
void *ggml_custom_4d(void *, int, int64_t, int64_t, int64_t, int64_t, void **, int, void *, int, void *);
void *ggml_new_graph(void *);
void ggml_build_forward_expand(void *, void *);
void *ggml_backend_init_by_type(int, const char *);
void *ggml_backend_reg_by_name(const char *);
void *ggml_backend_reg_get_proc_address(void *, const char *);
int ggml_backend_graph_compute(void *, void *);
"""
NODE_FUNCTIONS = """
void attend_node(void *, int, int, void *);
void read_node(void *, int, int, void *);
void sum_node(void *, int, int, void *);
"""


@lru_cache(maxsize=1)
def load() -> tuple[FFI, Any, Any, Any]:
    """The cffi instance of libxquant with ggml's declarations added; libggml-base, libggml, our nodes."""
    ffi, _ = native.load()
    ffi.cdef(GGML + native.declarations(NODES) + NODE_FUNCTIONS)
    base = ffi.dlopen(str(native.library_path("ggml-base")), ffi.RTLD_GLOBAL)
    registry = ffi.dlopen(str(native.library_path("ggml")))
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "nodes.so"
        command = [os.environ.get("CC", "cc"), "-O3", "-shared", "-fPIC", "-I", str(native.LIBRARY_DIR)]
        subprocess.run([*command, "-o", str(library), str(NODES)], check=True)
        nodes = ffi.dlopen(str(library))
    return ffi, base, registry, nodes


@lru_cache(maxsize=1)
def cpu() -> Any:
    """llama.cpp's CPU backend."""
    ffi, _, registry, _ = load()
    return registry.ggml_backend_init_by_type(0, ffi.NULL)


@lru_cache
def cpu_function(ctype: str, name: str) -> Any:
    """A function that llama.cpp's CPU backend hands out by its name."""
    ffi, _, registry, _ = load()
    reg = registry.ggml_backend_reg_by_name(b"CPU")
    return ffi.cast(ctype, registry.ggml_backend_reg_get_proc_address(reg, name.encode()))


class Graph:
    """A ggml graph with its tensors.  keep: what must live as long as it does."""

    def __init__(self, tensor_bytes: int) -> None:
        self.ffi, self.base, _, self.nodes = load()
        params = self.ffi.new("struct ggml_init_params *", {"mem_size": tensor_bytes + (8 << 20), "no_alloc": False})
        self.ctx = self.base.ggml_init(params[0])
        self.keep: list[Any] = []
        self.graph = self.ffi.NULL

    def pointer(self, ctype: str, array: NDArray[Any]) -> Any:
        """Of an array that lives as long as the graph."""
        self.keep.append(array)
        self.keep.append(self.ffi.from_buffer(ctype, array))
        return self.keep[-1]

    def new(self, ctype: str, value: Any = None) -> Any:
        self.keep.append(self.ffi.new(ctype, value))
        return self.keep[-1]

    def tensor(self, kind: int, *ne: int, data: NDArray[Any] | None = None) -> Any:
        """A tensor that holds data, byte for byte; 0 else."""
        tensor = self.base.ggml_new_tensor_4d(self.ctx, kind, *ne, *[1] * (4 - len(ne)))
        n = self.base.ggml_nbytes(tensor)
        raw = bytes(n) if data is None else np.ascontiguousarray(data).view(np.uint8).reshape(-1)
        if len(raw) != n:
            raise ValueError(f"{len(raw)} bytes for a tensor of {n}")
        self.ffi.memmove(self.base.ggml_get_data(tensor), raw, n)
        return tensor

    def node(self, name: str, job: Any, *sources: Any) -> Any:
        """A node of graph_nodes.c, run by all threads."""
        function = self.ffi.cast("void *", getattr(self.nodes, name))
        args = self.ffi.new("void *[]", sources or (self.tensor(F32, 16),))
        return self.base.ggml_custom_4d(self.ctx, F32, 16, 1, 1, 1, args, len(args), function, -1, job)

    def finish(self, *results: Any) -> None:
        self.graph = self.base.ggml_new_graph(self.ctx)
        for result in results:
            self.base.ggml_build_forward_expand(self.graph, result)
        self.results = results

    def run(self, n_threads: int) -> None:
        cpu_function("void (*)(void *, int)", "ggml_backend_set_n_threads")(cpu(), n_threads)
        if self.base.ggml_backend_graph_compute(cpu(), self.graph) != 0:
            raise ValueError("the graph failed")

    def close(self) -> None:
        self.base.ggml_free(self.ctx)


def in_turn(graphs: Sequence[Graph]) -> Graph:
    """One graph of what several compute, as of a model's layers: to start a graph wakes threads, which takes as long as
    a small operation."""
    out = Graph(0)
    out.finish(*(result for graph in graphs for result in graph.results))
    return out


def timed(runs: Mapping[str, Sequence[Callable[[], None]]], seconds: float) -> dict[str, tuple[float, float]]:
    """Median and least seconds of a call, in interleaved rounds of `seconds` in all for each; the calls of a name go in
    turn.  The least is what a machine with other work still shows."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for calls in runs.values():
        for call in calls:
            call()
    while min(sum(found) for found in times.values()) < seconds:
        for name, calls in runs.items():
            if sum(times[name]) > 4 * seconds:  # slow ones need not be seen as often
                continue
            for call in calls:
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return {name: (statistics.median(found), min(found)) for name, found in times.items()}


def run_seconds(graph: Graph, n_threads: int, rounds: int) -> float:
    """Median seconds of a graph, which is closed then."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        graph.run(n_threads)
        times.append(time.perf_counter() - start)
    graph.close()
    return statistics.median(times)


def read_speed(n_threads: int, size: int = 1 << 28, rounds: int = 7) -> float:
    """Bytes/s of a loop that only reads memory, much more of it than caches hold."""
    graph = Graph(0)
    data = np.ones(size // 8, np.uint64)
    job = graph.new("read_job *", {"data": graph.pointer("uint64_t[]", data), "n": len(data)})
    graph.finish(graph.node("read_node", job))
    return size / run_seconds(graph, n_threads, rounds)


def sum_seconds(n_threads: int, steps: int = 50_000, n_nodes: int = 16, rounds: int = 31) -> float:
    """Seconds of a node that only multiplies and adds in registers: half a millisecond of one thread, as attention."""
    graph = Graph(0)
    job = graph.new("sum_job *", {"n": steps})
    graph.finish(*(graph.node("sum_node", job) for _ in range(n_nodes)))
    return run_seconds(graph, n_threads, rounds) / n_nodes
