"""KL divergence of a cache's answers from those of the F16 cache, row by row, since vocabularies are large.

Exponentials are single precision, for speed, and all sums double precision: results are right to 1e-7.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]  # [row][vocabulary]


def log_sums(logits: Logits) -> NDArray[np.float64]:
    """Logarithm of the sum of exponentials of each row: what turns a logit into a log-probability."""
    return np.array([_log_sum(row) for row in logits])


class Expected:
    """The answers that others are compared with; logits are copied."""

    def __init__(self, logits: Logits) -> None:
        self._p = np.empty(logits.shape, np.float32)
        self.best = logits.argmax(1)
        """The likeliest token of each row."""
        sums = log_sums(logits)
        for p, row, log_sum in zip(self._p, logits, sums, strict=True):
            np.exp(row - np.float32(log_sum), out=p)
        self._total = self._p.sum(1, dtype=np.float64)  # 1, but for rounding
        self._entropy = self._expectation(logits, sums)

    def kld(self, logits: Logits, sums: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """KL divergence of other logits from these, row by row; sums: their log_sums, if they are known."""
        return self._entropy - self._expectation(logits, log_sums(logits) if sums is None else sums)

    def _expectation(self, logits: Logits, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean log-probability of other logits under these probabilities."""
        rows = zip(self._p, logits, strict=True)
        return np.array([np.einsum("i,i->", p, x, dtype=np.float64) for p, x in rows]) - self._total * sums


def _log_sum(row: NDArray[np.float32]) -> float:
    top = row.max()
    return float(top) + float(np.log(np.exp(row - top).sum(dtype=np.float64)))
