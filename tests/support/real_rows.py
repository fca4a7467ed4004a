"""Attention over real keys and values, sealed as a preset seals them, against float64: for a test and a benchmark."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from support.attention_cases import Case, Head, attend, expected
from xquant_gguf import codec, reference
from xquant_gguf.plan import PAGE, Layer, Plan
from xquant_gguf.probe import Probe

N_ROWS = 4


def real_head(layer: Layer, keys: NDArray[np.float16], values: NDArray[np.float16], seed: int) -> tuple[Case, Head]:
    """One KV head, all of its pages [token][width] sealed.

    The queries are keys of the text themselves, other tokens' and less their mean, as long as makes scores spread by 3:
    so attention is neither flat nor a single token."""
    n_pages = len(keys) // PAGE
    keys, values = keys[: n_pages * PAGE], values[: n_pages * PAGE]
    case = Case(keys.shape[1], values.shape[1], layer.k, layer.v, (-1,) * n_pages, N_ROWS, masked=False)
    head = Head.__new__(Head)
    head.windows = [np.zeros((1, PAGE, n), np.float16) for n in (case.d, case.e)]
    head.codes, head.params, head.read = [], [], []
    for name, side, rows in (("k", layer.k, keys), ("v", layer.v, values)):
        pages = rows.reshape(n_pages, PAGE, -1)
        sealed = [getattr(codec, f"seal_{name}")(side, page) for page in pages]
        for found, part in ((head.codes, 0), (head.params, 1)):
            found.append(np.stack([np.frombuffer(s[part], np.uint8) for s in sealed]))
        plain = [getattr(reference, f"dequantize_{name}")(side, rows.shape[1], *s) for s in sealed]
        head.read.append(np.concatenate(plain).astype(np.float64))
    chosen = np.random.default_rng(seed).integers(len(keys), size=N_ROWS)
    q = keys[chosen].astype(np.float64) - keys.astype(np.float64).mean(0)
    spread = (q @ head.read[0].T / np.sqrt(case.d)).std(1, keepdims=True)
    head.q = (q * 3 / spread).astype(np.float32)
    head.mask = np.zeros((N_ROWS, len(keys)), np.float16)
    head.hidden = head.mask == -np.inf
    return case, head


def errors(model: str, text: str, n_tokens: int, preset: str, sets: tuple[str, ...]) -> Iterator[dict[str, float]]:
    """Per layer (first KV head) and query: kernel set -> error of the output over the output, both as norms."""
    with Probe(model) as probe, probe.reading(probe.tokenize(text), n_tokens) as reading:
        found, plan = reading.rows, Plan.from_preset(preset, len(probe.layers))
    for i, layer in enumerate(plan.layers):
        case, head = real_head(layer, found[i, "k"][0], found[i, "v"][0], i)
        right = expected(case, head)
        out = {}
        for name in sets:
            with codec.force_kernels(name):
                out[name] = np.linalg.norm(attend(case, head, ()) - right, axis=1) / np.linalg.norm(right, axis=1)
        for row in range(N_ROWS):
            yield {name: float(x[row]) for name, x in out.items()}
