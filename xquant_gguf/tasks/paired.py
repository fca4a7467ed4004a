"""Whether a cache does worse than F16 on the same items, or whether chance alone would do as much: the sign test."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb


def sign_test(worse: int, better: int) -> float:
    """Two-sided exact p-value: how likely chance alone parts worse + better items at least as unevenly.

    For scores of 0 and 1 this is McNemar's exact test.
    """
    n = worse + better
    tail = sum(comb(n, k) for k in range(min(worse, better) + 1))
    return min(1.0, 2 * tail / 2**n)


def paired(scores: Sequence[float], f16: Sequence[float]) -> dict[str, float]:
    """worse, better: items on which the score is lower and higher than F16's; p: their sign_test."""
    worse = sum(a < b for a, b in zip(scores, f16, strict=True))
    better = sum(a > b for a, b in zip(scores, f16, strict=True))
    return {"worse": worse, "better": better, "p": sign_test(worse, better)}
