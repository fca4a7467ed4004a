"""Quality of KV cache types on a text: perplexity, and KL divergence and top-1 agreement with the F16 cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from xquant_gguf.divergence import Expected, Logits, log_sums
from xquant_gguf.kv_types import type_and_plan
from xquant_gguf.llama import Llama

RANGES = [512 << i for i in range(22)]
"""Where ranges of positions begin whose divergence is told apart; the further from the start, the more is codes."""


@dataclass
class Tally:
    """What adds up over the scored positions of one cache type."""

    nll: list[NDArray[np.float64]] = field(default_factory=list)
    kld: list[NDArray[np.float64]] = field(default_factory=list)
    same: list[NDArray[np.bool_]] = field(default_factory=list)
    position: list[NDArray[np.int64]] = field(default_factory=list)

    def add(self, expected: Expected, logits: Logits, targets: NDArray[np.int64], first: int) -> None:
        """logits [position][vocabulary] of this type, for positions of which the F16 cache's are expected.

        first: tokens that stand before the first of these positions in its window.
        """
        sums = log_sums(logits)
        self.nll.append(sums - logits[np.arange(len(targets)), targets])
        self.kld.append(expected.kld(logits, sums))
        self.same.append(expected.best == logits.argmax(1))
        self.position.append(np.arange(first, first + len(targets)))

    def result(self) -> dict[str, Any]:
        """ppl, kld (mean), its quantiles kld_p99 and kld_p999, kld_max, top1 (share), and by_position."""
        kld = np.concatenate(self.kld)
        return {
            "ppl": float(np.exp(np.concatenate(self.nll).mean())),
            "kld": float(kld.mean()),
            "kld_p99": float(np.quantile(kld, 0.99)),
            "kld_p999": float(np.quantile(kld, 0.999)),
            "kld_max": float(kld.max()),
            "top1": float(np.concatenate(self.same).mean()),
            "by_position": self._by_position(),
        }

    def _by_position(self) -> list[dict[str, float]]:
        """kld, top1 and n (positions) for ranges of a window that double in length, "first" to "last" position."""
        kld, same, position = (np.concatenate(part) for part in (self.kld, self.same, self.position))
        ranges = np.searchsorted(RANGES, position, side="right")
        out = []
        for number in np.unique(ranges):
            at = ranges == number
            where = {"first": int(position[at].min()), "last": int(position[at].max()), "n": int(at.sum())}
            out.append({**where, "kld": float(kld[at].mean()), "top1": float(same[at].mean())})
        return out


def log_probabilities(llm: Llama, tokens: Sequence[int], n_past: int) -> Logits:
    """Decodes tokens at positions n_past .. and gives log-probabilities [token][vocabulary]."""
    logits = llm.session.answer(tokens, n_past)
    return logits - log_sums(logits)[:, None].astype(np.float32)


def load(model_path: str, kv: str, common: Mapping[str, Any]) -> Llama:
    """A model with a cache, flash attention on; kv: a kv_type, or a JSON file with a plan.  common: of Llama."""
    kv_type, plan = type_and_plan(kv)
    return Llama(model_path, kv_type=kv_type, kv_plan=plan, flash_attn=True, **common)


class Cache(Protocol):
    """What is scored: a Session, or what behaves like one."""

    def clear(self) -> None: ...

    def answer(self, tokens: Sequence[int], first: int, /) -> Logits: ...


def add_window(
    tallies: Mapping[str, Tally],
    caches: Mapping[str, Cache],
    window: Sequence[int],
    skip: int,
    n_ubatch: int,
    done: Callable[[int], object],
) -> None:
    """Scores caches on a window of tokens, in step, from position `skip` on; the first is the F16 one.

    Micro-batches of n_ubatch tokens read what the earlier ones stored.  done: told of tokens that were decoded.
    """
    for cache in caches.values():
        cache.clear()
    for first in range(0, len(window), n_ubatch):
        chunk = window[first : first + n_ubatch]
        # the last token of a window has no next one to be scored against
        low, high = max(skip - first, 0), min(len(chunk), len(window) - 1 - first)
        targets = np.array(window[first + low + 1 : first + high + 1], dtype=np.int64)
        expected = None
        for kv, cache in caches.items():
            logits = cache.answer(chunk, first)[low:high]
            done(len(chunk))
            if low < high:
                expected = expected or Expected(logits)
                tallies[kv].add(expected, logits, targets, first + low)


def evaluate(
    model_path: str,
    text: str,
    kv_types: Sequence[str],
    *,
    n_tokens: int,
    n_ctx: int = 4096,
    skip: int = 512,
    n_ubatch: int = 512,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores every cache type on the first n_tokens of a text, all types in step with an F16 one.

    The text is cut into windows of n_ctx tokens (0: as many as the model was trained with); positions from `skip` on
    are scored in each.  Micro-batches of n_ubatch tokens read what the earlier ones stored, as in use: the quantized
    cache is read during the prompt too.  kv_types: names of Llama's kv_type, or JSON files with plans.
    Returns {"results": [one dictionary a type], settings...}.  Raises ValueError if the text is too short.
    """
    common: dict[str, Any] = {"n_ctx": n_ctx, "n_batch": n_ubatch, "n_ubatch": n_ubatch, "verbose": False}
    common.update(n_threads=n_threads, n_threads_batch=n_threads, n_gpu_layers=n_gpu_layers)
    models = {kv: load(model_path, kv, common) for kv in dict.fromkeys(("f16", *kv_types))}
    sessions = {kv: llm.session for kv, llm in models.items()}
    n_ctx = n_ctx or models["f16"].n_ctx()
    tokens = models["f16"].tokenize(text.encode(), special=False)[:n_tokens]
    if min(n_tokens, n_ctx) <= skip + 1:
        raise ValueError(f"n_tokens is {n_tokens} and n_ctx {n_ctx}: both must be above skip + 1, {skip + 1}")
    if len(tokens) < n_tokens:
        raise ValueError(f"the text has {len(tokens)} tokens, {n_tokens} were asked for")

    tallies = {kv: Tally() for kv in models}
    with tqdm(total=n_tokens * len(models), unit="token", disable=not progress) as bar:
        for start in range(0, n_tokens, n_ctx):
            add_window(tallies, sessions, tokens[start : start + n_ctx], skip, n_ubatch, bar.update)

    results = []
    for kv in kv_types:
        info = models[kv].kv_cache_info()
        bits = {name: info[name] for name in ("true_bits", "equivalent_bits")}
        results.append({"kv_type": kv, **tallies[kv].result(), **bits, "kv_bytes": info["bytes_allocated"]})
    settings = {"model": Path(model_path).name, "tokens": n_tokens, "n_ctx": n_ctx, "skip": skip, "n_ubatch": n_ubatch}
    return {"results": results, **settings, "kernels": Llama.kernels()}
