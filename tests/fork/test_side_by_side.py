"""Recipes simulated in an F16 cache (benchmarks/side_by_side.py): which rows are replaced, and what reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipes import Exact, Recipe, Tiles
from side_by_side import Simulated
from support import tiny_gguf
from xquant_gguf import fork
from xquant_gguf.divergence import Logits
from xquant_gguf.plan import PAGE
from xquant_gguf.probe import Rows, unsealed
from xquant_gguf.session import Model, Session

N_UBATCH, N_TOKENS = 4 * PAGE, 8 * PAGE
TOKENS = [int(t) for t in np.random.default_rng(5).integers(3, tiny_gguf.N_VOCAB, N_TOKENS)]


class Halved(Exact):
    """Gives back half of what was stored."""

    def back(self, tiles: Tiles, name: str) -> Tiles:
        return tiles * np.float32(0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    shape = tiny_gguf.Shape(n_layer=2)
    path = tiny_gguf.write(tmp_path_factory.mktemp("sides") / "model.gguf", shape, tiny_gguf.random_weights(shape))
    with Model(Path(path)) as out:
        yield out


def answers(model: Model, recipe: Recipe | None) -> tuple[list[Logits], dict[tuple[int, str], Rows]]:
    """Logits of both micro-batches and then the rows, of a simulated cache or, without a recipe, an F16 one."""

    def session(**more: Any) -> Session:
        return model.session("xquant", n_ctx=N_TOKENS, n_ubatch=N_UBATCH, n_threads=1, **more)

    shapes, numbers, _ = model.cache_layers
    layers = list(zip(numbers, shapes, strict=True))
    with session() as leader, session(plan=unsealed(model.cache_plan)) as exact:
        cache = exact if recipe is None else Simulated(exact, layers, recipe, leader)
        logits: list[Logits] = []
        for _ in range(2):  # clearing forgets all
            logits.clear()
            cache.clear()
            leader.clear()
            for first in range(0, N_TOKENS, N_UBATCH):
                leader.answer(TOKENS[first : first + N_UBATCH], first)
                logits.append(cache.answer(TOKENS[first : first + N_UBATCH], first).copy())
        rows = {
            (layer, name): fork.read_rows(exact.ctx, layer, name, 0, N_TOKENS, shape.d)
            for layer, shape in layers
            for name in "kv"
        }
    return logits, rows


def test_nothing_lost_is_an_f16_cache(model: Model) -> None:
    for found, expected in zip(answers(model, Exact())[0], answers(model, None)[0], strict=True):
        np.testing.assert_array_equal(found, expected)


def test_what_left_the_window_is_replaced_once(model: Model) -> None:
    """The first page and the newest stay; the next micro-batch reads what was replaced."""
    (first, second), rows = answers(model, Halved())
    (same, other), exact = answers(model, None)
    np.testing.assert_array_equal(first, same)
    assert np.abs(second - other).max() > 1e-3
    sealed = slice(PAGE, N_TOKENS - PAGE)
    for name in "kv":  # of the first layer, which nothing else changes
        expected = exact[0, name].copy()
        expected[sealed] /= 2
        np.testing.assert_array_equal(rows[0, name], expected)
