"""Threads that wait for the graphs of a CPU backend, where there is no OpenMP (native/llama/cpu-threads.h).

tests/wheels looks for them in every wheel.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import llama_cpp
import pytest

from support import gpu
from xquant_gguf import Llama

TOKENS = [1 + 7 * i % 250 for i in range(300)]
pytestmark = [
    pytest.mark.skipif(b"OPENMP = 1" in llama_cpp.llama_print_system_info(), reason="OpenMP has threads of its own"),
    pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux does"),
]


def opened(path: Path) -> Llama:
    """Two threads beside this one for a token, one for a prompt."""
    return Llama(str(path), kv_type="xquant", n_ctx=512, n_ubatch=64, n_threads=3, n_threads_batch=2, verbose=False)


def threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def test_they_stay_until_the_context_is_freed(paths: dict[str, Path]) -> None:
    before = threads()
    llm = opened(paths["plain"])
    llm.eval(TOKENS)
    llm.eval(TOKENS[:1])
    waiting = threads() - before
    assert len(waiting) == 4  # one for pages that become codes between graphs
    for _ in range(3):
        llm.eval(TOKENS[:1])
    llm.reset()
    llm.eval(TOKENS)
    assert threads() - before == waiting
    llm.close()
    assert not threads() - before


def test_numbers_of_threads_that_nobody_asks_for_any_more_are_ended(paths: dict[str, Path]) -> None:
    before = threads()
    llm = opened(paths["plain"])
    for n in range(2, 12):
        llama_cpp.llama_set_n_threads(llm.ctx, n, n)
        llm.eval(TOKENS[:2])
        assert len(threads() - before) <= 4 * n
    llm.close()
    assert not threads() - before


@pytest.mark.skipif(gpu.available(), reason="CUDA does not live in a forked process")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_process_has_some_of_its_own(paths: dict[str, Path]) -> None:
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
