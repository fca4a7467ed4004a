"""What the benchmarks of changed keys and values share: a model's text, and how a divergence is printed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xquant_gguf.probe import Probe

N_READ, PASSAGE = 2048, 32


def tokens_of(path: Path, skip: int, probe: Probe) -> list[int]:
    """N_READ tokens of a text from its character `skip` on, and those of a passage behind them."""
    text = path.read_text(errors="replace")[skip:]
    return probe.tokenize(text[: 8 * N_READ])[: N_READ + PASSAGE]


def mean(kld: NDArray[np.float64]) -> str:
    """Mean and standard error."""
    return f"{kld.mean():.4f} ({kld.std() / len(kld) ** 0.5:.4f})"
