"""Threads that wait for a context's work (xquant_gguf.threads)."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from support import gpu
from xquant_gguf import Llama, environment, threads
from xquant_gguf.session import Model

TOKENS = [1 + 7 * i % 250 for i in range(300)]
no_openmp = pytest.mark.skipif(not threads.are_needed(), reason="OpenMP has threads of its own")


def opened(path: Path, n_threads: int = 3, n_threads_batch: int = 2) -> Llama:
    return Llama(
        str(path), kv_type="xquant", n_ctx=512, n_ubatch=64, n_threads=n_threads, n_threads_batch=n_threads_batch,
        logits_all=True, verbose=False,
    )  # fmt: skip


def test_they_compute_the_same(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for needed in (False, True):
        monkeypatch.setattr(threads, "are_needed", lambda needed=needed: needed)
        llm = opened(paths["plain"])
        for first, end in ((0, 256), (256, 257), (257, 300)):  # both pools
            llm.eval(TOKENS[first:end])
        found.append(llm.scores[:300].copy())
        llm.close()
    np.testing.assert_array_equal(*found)


def test_a_context_gives_them_back(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever frees it: llama_cpp's own object of the context, the session, a Llama that was not closed, one of
    llama_cpp's own that a variable gave our cache."""
    monkeypatch.setattr(threads, "are_needed", lambda: True)
    close = threads.WaitingThreads.close
    closed: list[None] = []
    monkeypatch.setattr(threads.WaitingThreads, "close", lambda self: closed.append(close(self)))
    llm = opened(paths["plain"])
    llm._ctx.close()
    assert len(closed) == 1
    llm.close()
    llm = opened(paths["plain"])
    llm.eval(TOKENS)
    del llm
    with Model(str(paths["plain"])) as model, model.session("xquant", n_ctx=512, n_threads=2) as session:
        session.decode([(token, i, (0,)) for i, token in enumerate(TOKENS)])
    assert len(closed) == 3
    monkeypatch.setenv("XQUANT_KV_TYPE", "xquant")
    plain = llama_cpp.Llama.__new__(llama_cpp.Llama)
    environment.make(llama_cpp.Llama.__init__, plain, str(paths["plain"]), {"n_threads": 2, "verbose": False})
    plain.eval(TOKENS)
    plain.close()
    assert len(closed) == 4


def test_one_thread_needs_none(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "are_needed", lambda: True)
    llm = opened(paths["plain"], 1, 1)
    assert threads.waiting_for(llm.ctx) is None
    llm.close()


@no_openmp
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux does")
def test_they_stay(paths: dict[str, Path]) -> None:
    """Two more than this one for a token, one more for a prompt."""

    def mine() -> set[str]:
        return set(os.listdir("/proc/self/task"))

    before = mine()
    llm = opened(paths["plain"])
    waiting = mine() - before
    assert len(waiting) == 3
    llm.eval(TOKENS)
    llm.eval(TOKENS[:1])
    assert mine() - before == waiting
    llm.close()
    assert not mine() - before


@no_openmp
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.skipif(gpu.available(), reason="CUDA does not live in a forked process")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_process_goes_on_without(paths: dict[str, Path]) -> None:
    llm = opened(paths["plain"])
    llm.eval(TOKENS[:200])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(60)
            llm.eval(TOKENS[200:])
            llm.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    llm.eval(TOKENS[200:])
    llm.close()
