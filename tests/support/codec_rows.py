"""F16 rows that are traps for a codec, and where its golden vectors lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xquant_gguf.plan import PAGE

GOLDEN = Path(__file__).parent.parent / "golden" / "codec.json"
Rows = NDArray[np.float16]


def made_rows(kind: str, width: int, seed: int) -> Rows:
    """F16 rows [PAGE][width] of a kind that has its own traps."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((PAGE, width))
    if kind == "bias":  # Qwen2's keys: a few channels far from zero
        x = x + 200.0 * (rng.random(width) < 0.1)
    elif kind == "outlier":
        x[rng.integers(PAGE), rng.integers(width)] = 3e4
    elif kind == "constant":
        x = np.broadcast_to(rng.standard_normal(width), (PAGE, width))
    elif kind == "zero":
        x = np.zeros((PAGE, width))
    elif kind == "denormal":
        x = x * 1e-7
    elif kind == "huge":
        x = x * 4e4
    return np.clip(x, -65504, 65504).astype(np.float16)


KINDS = ("normal", "bias", "outlier", "constant", "zero", "denormal", "huge")
