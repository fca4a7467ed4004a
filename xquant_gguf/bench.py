"""Prompt and decode speed of KV cache types side by side, in interleaved rounds at given depths."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np

from xquant_gguf.gguf_file import GGUFFile
from xquant_gguf.inspect import CacheInfo
from xquant_gguf.kv_types import checked_kv_type, number_of, type_and_plan
from xquant_gguf.session import Model, Session

UNTIMED = 4
"""Tokens decoded between a prompt and the clock: on a GPU the first ones record the graph that the others replay."""


@dataclass(frozen=True)
class Row:
    """Medians over rounds for one KV type at one depth: tokens/s of all `parallel` sequences together, seconds of a
    decode step, bytes of the whole cache, and bytes that a step must read: weights, and what the cache holds at that
    depth."""

    kv_type: str
    depth: int
    prompt_tps: float
    decode_tps: float
    step_s: float
    kv_bytes: int
    step_bytes: int
    parallel: int


def weight_bytes(model: str) -> int:
    """Bytes of the weights that every token reads: all but an embedding that is not the output's."""
    tensors = GGUFFile(model).tensor_bytes()
    unread = tensors.get("token_embd.weight", 0) if "output.weight" in tensors else 0
    return sum(tensors.values()) - unread


def _session(
    model: Model, kv_type: str, n_ctx: int, parallel: int, options: Mapping[str, Any]
) -> tuple[Session, CacheInfo]:
    """A context of so many sequences of n_ctx tokens, and what its cache is."""
    name, plan = type_and_plan(kv_type)
    cache = checked_kv_type(name, plan, {}) or "xquant"
    sizes = {"n_ctx": n_ctx * parallel, "n_batch": max(512, parallel), "n_seq": parallel, **options}
    session = model.session(cache, plan=plan, unified=parallel == 1, flash_attn=True, **sizes)
    return session, CacheInfo(session.ctx, kv_type, (number_of(cache),) * 2)


class Runner:
    """One model with one KV type; the cache of each sequence holds the first tokens of an endless random text."""

    def __init__(
        self, model: str, kv_type: str, n_ctx: int, parallel: int = 1, *, n_gpu_layers: int = 0, **options: Any
    ) -> None:
        self.parallel = parallel
        self._model = Model(model, n_gpu_layers=n_gpu_layers)
        self._session, self._cache = _session(self._model, kv_type, n_ctx, parallel, options)
        self._tokens = np.random.default_rng(0).integers(3, self._session.n_vocab, n_ctx).tolist()
        self._filled = 0

    def close(self) -> None:
        """Frees model and contexts."""
        self._session.close()
        self._model.close()

    def _prompt(self, first: int, end: int, sequences: int) -> None:
        """Tokens first .. end - 1 of the first so many sequences, in batches."""
        size = self._session.n_batch
        for s in range(sequences):
            for i in range(first, end, size):
                self._session.decode([(self._tokens[at], at, (s,)) for at in range(i, min(i + size, end))], "last")

    def _steps(self, first: int, n: int, size: int) -> int:
        """n steps of all sequences from token `first` on, `size` tokens each; returns the first token behind them."""
        for _ in range(n):
            some = range(first, first + size)
            self._session.decode([(self._tokens[at], at, (s,)) for s in range(self.parallel) for at in some])
            self._session.wait()
            first += size
        return first

    def fill(self, depth: int) -> None:
        """Fills the cache up to a depth, of each sequence: all but the first are copies."""
        self._prompt(self._filled, depth, 1)
        for s in range(1, self.parallel):
            self._session.remove(s, 0)
            self._session.copy(0, s)
        self._filled = depth
        self._session.wait()

    def measure(self, n_prompt: int, n_decode: int, step: int = 1) -> tuple[float, float]:
        """Prompt and decode tokens/s at the depth that is filled; the cache is left as it was.

        n_decode: steps, of `step` tokens each.
        """
        prompt = self._filled + n_prompt
        start = time.perf_counter()
        self._prompt(self._filled, prompt, self.parallel)
        self._session.wait()
        middle = time.perf_counter()
        decode = self._steps(prompt, UNTIMED, step)
        begin = time.perf_counter()
        self._steps(decode, n_decode, step)
        end = time.perf_counter()
        for s in range(self.parallel):
            self._session.remove(s, self._filled)
        return self.parallel * n_prompt / (middle - start), self.parallel * n_decode * step / (end - begin)

    def cache_bytes(self) -> tuple[int, int]:
        """Bytes of the cache, and those that tokens take."""
        info = self._cache.now(self._filled * self.parallel)
        return int(info["bytes_allocated"]), int(info["bytes_used"])


def sequences_that_fit(model: str, kv_type: str, n_ctx: int, memory: int) -> int:
    """How many sequences of n_ctx tokens a cache of this type holds in so many bytes of memory, beside the weights.

    At most llama.cpp's limit.  Weights are not loaded.  Raises ValueError if not even one does.
    """
    sizes = []
    with Model(model, weights=False) as unloaded:
        for parallel in (1, 2):
            session, cache = _session(unloaded, kv_type, n_ctx, parallel, {})
            with session:
                sizes.append(int(cache.now()["bytes_allocated"]))
    least = weight_bytes(model) + sizes[0]
    if memory < least:
        raise ValueError(f"memory is {memory} bytes, must be at least {least}: weights and one sequence with {kv_type}")
    return min(1 + (memory - least) // (sizes[1] - sizes[0]), int(llama_cpp.llama_max_parallel_sequences()))


def bench(
    model: str,
    kv_types: Sequence[str],
    depths: Sequence[int],
    *,
    rounds: int = 3,
    n_prompt: int = 256,
    n_decode: int = 16,
    parallel: int = 1,
    step: int = 1,
    memory: int | None = None,
    done: Callable[[str], object] = lambda what: None,
    **options: Any,
) -> list[Row]:
    """Speed of every KV type at every depth; the caches of all types are held at once, and measured in turn.

    depths: tokens in the cache beforehand, of each sequence.  n_prompt, n_decode: prompt tokens and decode steps that
    are timed, likewise; an untimed round of them comes first.  parallel: sequences, decoded together.  step: tokens of
    a sequence in a decode step, as speculative decoding has several.  memory: bytes; each type has as many sequences as
    fit beside the weights, and the types are measured one after another.  done: called after each step,
    len(depths) * (rounds + 2) of them for each KV type.  options: n_gpu_layers (-1: all) of a Model, and of its
    session n_threads.  Raises ValueError if a number is out of range.
    """
    if memory is not None and parallel != 1:
        raise ValueError(f"parallel is {parallel}, and memory says how many sequences there are: give one of them")
    for name, value, low in (
        ("rounds", rounds, 1),
        ("n_prompt", n_prompt, 1),
        ("n_decode", n_decode, 1),
        ("parallel", parallel, 1),
        ("step", step, 1),
    ):
        if value < low:
            raise ValueError(f"{name} is {value}, must be at least {low}")
    if not depths or min(depths) < 0:
        raise ValueError(f"depths are {list(depths)}, must be 0 or more")
    n_ctx = max(depths) + n_prompt + (UNTIMED + n_decode) * step
    n_ctx += -n_ctx % 256
    if memory is not None:
        numbers: dict[str, Any] = {"rounds": rounds, "n_prompt": n_prompt, "n_decode": n_decode, "step": step}
        found = []
        for kv_type in kv_types:
            fit = sequences_that_fit(model, kv_type, n_ctx, memory)
            found += bench(model, [kv_type], depths, parallel=fit, done=done, **numbers, **options)
        return sorted(found, key=lambda row: row.depth)
    weights = weight_bytes(model)
    runners = [Runner(model, kv_type, n_ctx, parallel, **options) for kv_type in kv_types]
    rows = []
    for depth in sorted(depths):
        for runner in runners:
            runner.fill(depth)
            done("fill")
            runner.measure(n_prompt, n_decode, step)
            done("warm up")
        runs: list[list[tuple[float, float]]] = [[] for _ in runners]
        for _ in range(rounds):
            for runner, speeds in zip(runners, runs, strict=True):
                speeds.append(runner.measure(n_prompt, n_decode, step))
                done("measure")
        for kv_type, runner, speeds in zip(kv_types, runners, runs, strict=True):
            prompt, decode = (statistics.median(run[i] for run in speeds) for i in (0, 1))
            allocated, used = runner.cache_bytes()
            step_s = parallel * step / decode
            rows.append(Row(kv_type, depth, prompt, decode, step_s, allocated, weights + used, parallel))
    for runner in runners:
        runner.close()
    return rows
