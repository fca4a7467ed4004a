"""Prompt and decode speed of KV cache types side by side, in interleaved rounds at given depths."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xquant_gguf.evaluate import load
from xquant_gguf.sizes import llama_cpp


@dataclass(frozen=True)
class Row:
    """Medians over rounds for one KV type at one depth: tokens/s, and the bytes of the whole cache."""

    kv_type: str
    depth: int
    prompt_tps: float
    decode_tps: float
    kv_bytes: int


class Runner:
    """One model with one KV type; its cache holds the first tokens of an endless random text."""

    def __init__(self, model: str, kv_type: str, n_ctx: int, **options: Any) -> None:
        self.llm = load(model, kv_type, {"n_ctx": n_ctx, "verbose": False, **options})
        self.tokens = np.random.default_rng(0).integers(3, self.llm.n_vocab(), n_ctx).tolist()
        self.filled = 0

    def decode(self, first: int, end: int) -> None:
        """Tokens first .. end - 1, in batches."""
        for i in range(first, end, self.llm.n_batch):
            self.llm._batch.set_batch(self.tokens[i : min(i + self.llm.n_batch, end)], i, logits_all=False)
            self.llm._ctx.decode(self.llm._batch)

    def fill(self, depth: int) -> None:
        self.decode(self.filled, depth)
        self.filled = depth
        self.wait()

    def wait(self) -> None:
        llama_cpp.llama_synchronize(self.llm._ctx.ctx)

    def measure(self, n_prompt: int, n_decode: int) -> tuple[float, float]:
        """Prompt and decode tokens/s at the depth that is filled; the cache is left as it was."""
        depth = self.filled
        start = time.perf_counter()
        self.decode(depth, depth + n_prompt)
        self.wait()
        middle = time.perf_counter()
        for i in range(depth + n_prompt, depth + n_prompt + n_decode):
            self.decode(i, i + 1)
            self.wait()
        end = time.perf_counter()
        self.llm._ctx.kv_cache_seq_rm(0, depth, -1)
        return n_prompt / (middle - start), n_decode / (end - middle)


def bench(
    model: str,
    kv_types: Sequence[str],
    depths: Sequence[int],
    *,
    rounds: int = 3,
    n_prompt: int = 256,
    n_decode: int = 16,
    done: Callable[[str], object] = lambda what: None,
    **options: Any,
) -> list[Row]:
    """Speed of every KV type at every depth; the caches of all types are held at once.

    depths: tokens in the cache beforehand.  n_prompt, n_decode: tokens that are timed; an untimed round of them comes
    first.  done: called after each step, len(depths) * (rounds + 2) of them for each KV type.  options: of Llama.
    Raises ValueError if a number is out of range.
    """
    for name, value, low in (("rounds", rounds, 1), ("n_prompt", n_prompt, 1), ("n_decode", n_decode, 1)):
        if value < low:
            raise ValueError(f"{name} is {value}, must be at least {low}")
    if not depths or min(depths) < 0:
        raise ValueError(f"depths are {list(depths)}, must be 0 or more")
    n_ctx = max(depths) + n_prompt + n_decode
    runners = [Runner(model, kv_type, n_ctx + -n_ctx % 256, **options) for kv_type in kv_types]
    rows = []
    for depth in sorted(depths):
        for runner in runners:
            runner.fill(depth)
            done("fill")
            runner.measure(n_prompt, n_decode)
            done("warm up")
        runs: list[list[tuple[float, float]]] = [[] for _ in runners]
        for _ in range(rounds):
            for runner, found in zip(runners, runs, strict=True):
                found.append(runner.measure(n_prompt, n_decode))
                done("measure")
        for kv_type, runner, found in zip(kv_types, runners, runs, strict=True):
            prompt, decode = (statistics.median(run[i] for run in found) for i in (0, 1))
            n_bytes = int(runner.llm.kv_cache_info()["bytes_allocated"])
            rows.append(Row(kv_type, depth, prompt, decode, n_bytes))
    for runner in runners:
        runner.llm.close()
    return rows
