"""Threads that wait for the work of a context.

llama.cpp without OpenMP, as it is in wheels, starts threads for every graph, that is for every token, and ends them, if
a context was given none that wait; llama_cpp gives none.
"""

from __future__ import annotations

import os
import weakref
from typing import Any, ClassVar

import llama_cpp

from xquant_gguf import fork


def _cpu_function(name: str) -> Any:
    """A function that llama.cpp's CPU backend hands out by its name."""
    ffi, lib = fork.load()
    return ffi.cast(name, lib.ggml_backend_reg_get_proc_address(lib.ggml_backend_reg_by_name(b"CPU"), name.encode()))


def new_pool(n_threads: int, poll: int | None = None) -> Any:
    """A pool of threads of ggml.  poll: how long they look for work before they sleep, 0 to 100; None: ggml's 50."""
    ffi, lib = fork.load()
    params = ffi.new("struct ggml_threadpool_params *")
    lib.ggml_threadpool_params_init(params, n_threads)
    if poll is not None:
        params.poll = poll
    return _cpu_function("ggml_threadpool_new")(params)


def are_needed() -> bool:
    """Whether llama.cpp would start threads for every graph: it was built without OpenMP."""
    return b"OPENMP = 1" not in llama_cpp.llama_print_system_info()


class WaitingThreads:
    """Those of one context: for single tokens, and for more.  They sleep between graphs, so that nothing is kept busy
    when there is no work."""

    _all: ClassVar[weakref.WeakSet[WaitingThreads]] = weakref.WeakSet()

    def __init__(self, ctx: Any) -> None:
        """ctx: of llama_cpp; close() comes before it is freed."""
        self._ctx, self._lib = fork.context(ctx), fork.load()[1]
        self._free = _cpu_function("ggml_threadpool_free")  # found now: Python may be ending when it is called
        counts = int(llama_cpp.llama_n_threads(ctx)), int(llama_cpp.llama_n_threads_batch(ctx))
        self._pools = {n: new_pool(n, poll=0) for n in set(counts)}
        self._lib.llama_attach_threadpool(self._ctx, *(self._pools[n] for n in counts))
        self._all.add(self)

    def close(self) -> None:
        """Ends the threads; the context can go on without."""
        pools, self._pools = self._pools, {}
        if pools:
            self._lib.llama_detach_threadpool(self._ctx)
        for pool in pools.values():
            self._free(pool)

    @classmethod
    def forget_all(cls) -> None:
        """In a process that was forked: it has the contexts, but none of their threads."""
        for threads in cls._all:
            if threads._pools:
                threads._pools = {}
                threads._lib.llama_detach_threadpool(threads._ctx)


def waiting_for(ctx: Any) -> WaitingThreads | None:
    """Gives a context threads that wait; None where llama.cpp has some, or the context needs one alone."""
    several = max(llama_cpp.llama_n_threads(ctx), llama_cpp.llama_n_threads_batch(ctx)) > 1
    return WaitingThreads(ctx) if several and are_needed() else None


def wait_for(llm: llama_cpp.Llama) -> None:
    """The same for the context of a Llama: whoever frees it, its threads end before."""
    if llm.ctx is not None and (waiting := waiting_for(llm.ctx)) is not None:
        llm._ctx._exit_stack.callback(waiting.close)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=WaitingThreads.forget_all)
