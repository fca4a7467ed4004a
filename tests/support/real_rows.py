"""Attention over real keys and values, sealed as a preset seals them, against double precision."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from support import specification
from support.devices import device
from support.storage import SEALED, Move, Storage
from xquant_gguf.plan import PAGE, Layer, Plan
from xquant_gguf.probe import Probe

N_ROWS = 4


def sealed_head(kernels: str, layer: Layer, keys: NDArray[np.float16], values: NDArray[np.float16]) -> Storage:
    """One KV head, all of its pages [token][width] sealed."""
    n_pages = len(keys) // PAGE
    rows = [x[: n_pages * PAGE].reshape(1, 1, n_pages, PAGE, -1) for x in (keys, values)]
    storage = Storage(device(f"cpu-{kernels}"), layer, (rows[0], rows[1]), n_pages)
    storage.update([Move(page, page) for page in range(n_pages)])
    return storage


def queries(keys: NDArray[np.float16], stored: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Keys of the text themselves, other tokens' and less their mean, as long as makes scores spread by 3: so attention
    is neither flat nor a single token.  [1][N_ROWS][1][d]"""
    chosen = np.random.default_rng(seed).integers(len(stored), size=N_ROWS)
    q = keys[chosen].astype(np.float64) - keys[: len(stored)].astype(np.float64).mean(0)
    spread = (q @ stored.T.astype(np.float64) / np.sqrt(keys.shape[1])).std(1, keepdims=True)
    return (q * 3 / spread).astype(np.float32)[None, :, None]


def errors(model: str, text: str, n_tokens: int, preset: str, sets: tuple[str, ...]) -> Iterator[dict[str, float]]:
    """Per layer (first KV head) and query: kernel set -> error of the output over the output, both as norms."""
    with Probe(model) as probe, probe.reading(probe.tokenize(text), n_tokens) as reading:
        found, plan = reading.rows, Plan.from_preset(preset, len(probe.layers))
    for i, layer in enumerate(plan.layers):
        keys, values = found[i, "k"][0], found[i, "v"][0]
        table, scale = [[SEALED] * (len(keys) // PAGE)], keys.shape[1] ** -0.5
        out = {}
        for name in sets:
            storage = sealed_head(name, layer, keys, values)
            pages = specification.Pages(storage)
            stored = {part: pages.stored(part, table) for part in "kv"}
            q = queries(keys, stored["k"][0, 0], i)
            right = specification.attention(q, table, None, stored["k"], stored["v"], scale=scale)
            got = storage.attend(q, table, scale=scale)
            out[name] = np.linalg.norm(got - right, axis=-1).ravel() / np.linalg.norm(right, axis=-1).ravel()
        for row in range(N_ROWS):
            yield {name: float(x[row]) for name, x in out.items()}
