"""A clock that only decoding moves: speeds that a test knows beforehand."""

from __future__ import annotations

import time
from typing import Any

import pytest

from support.contexts import llama_cpp


class Clock:
    """Stands for time.perf_counter: each llama_decode takes a second, and an eighth of one for each of its tokens.

    batches: (first position, tokens) of each of them.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.batches: list[tuple[int, int]] = []
        self.decode = llama_cpp.llama_decode
        for module in (llama_cpp, llama_cpp.llama_cpp):
            monkeypatch.setattr(module, "llama_decode", self.timed_decode)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def timed_decode(self, ctx: Any, batch: Any) -> int:
        self.batches.append((batch.pos[0], batch.n_tokens))
        self.now += seconds(batch.n_tokens)
        return int(self.decode(ctx, batch))


def seconds(n_tokens: int) -> float:
    """What a batch takes."""
    return 1 + n_tokens / 8
