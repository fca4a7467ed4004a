"""Recipes of other caches (benchmarks/recipes.py): what they store, what they give back, what they take."""

from __future__ import annotations

import argparse

import gguf
import numpy as np
import pytest

from recipes import Blocks, Exact, KVarN, Recipe, TurboQuant, codebook, turned
from side_by_side import RECIPES, recipe, recipes, true_bits
from xquant_gguf.plan import PAGE, Shape


def tiles(width: int = 64) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(0).normal(size=(40, PAGE, width)).astype(np.float32)


def left_over(recipe: Recipe, x: np.ndarray[tuple[int, ...], np.dtype[np.float32]], name: str) -> float:
    """The share of x's squares that its error has."""
    return float(((recipe.back(x, name) - x) ** 2).sum() / (x**2).sum())


@pytest.mark.parametrize(("bits", "name"), [(4, "Q4_0"), (8, "Q8_0")])
def test_blocks_are_those_of_ggml(bits: int, name: str) -> None:
    x = tiles()
    kind = gguf.GGMLQuantizationType[name]
    want = gguf.quants.dequantize(gguf.quants.quantize(turned(x), kind), kind)
    wrong = np.abs(turned(Blocks(bits).back(x, "k")) - want) > 1e-5
    assert wrong.mean() < 1e-4  # values half-way between two codes


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("q4_0", 0.007, 0.008), ("kvarn2", 0.12, 0.2), ("kvarn3", 0.03, 0.05), ("kvarn4", 0.006, 0.011),
        ("turbo2", 0.11, 0.12), ("turbo3", 0.03, 0.035), ("turbo4", 0.008, 0.01), ("turbo8", 1e-5, 1e-4),
        ("turbor2", 0.11, 0.12),
    ],
)  # fmt: skip
def test_errors_are_those_of_so_many_bits(name: str, least: float, most: float) -> None:
    """On Gaussian values, keys and values; Lloyd-Max levels leave over 0.1175, 0.0345 and 0.0095 of them."""
    assert all(least < left_over(recipe(name), tiles(), side) < most for side in "kv")
    assert left_over(recipe("exact"), tiles(), "k") == 0


def test_kvarn_evens_out_tokens_and_channels() -> None:
    """Tokens and channels of any length lose the same share, where steps of one axis alone lose more."""
    rng = np.random.default_rng(1)
    x = tiles() * np.exp(rng.normal(size=(40, PAGE, 1))) * np.exp(rng.normal(size=(1, 1, 64)))
    x = turned(8 * x.astype(np.float32))  # so that the recipe's own rotation gives back what is uneven
    for name in "kv":
        assert left_over(KVarN(4, 4), x, name) < 0.02 < 2 * left_over(KVarN(4, 4), x, name) + 0.02
        assert left_over(KVarN(4, 4), x, name) < 0.7 * left_over(KVarN(4, 4, rounds=0), x, name)


def test_turboquant_keeps_lengths() -> None:
    x = 5 * tiles()
    back = TurboQuant(2, 2).back(x, "k")
    np.testing.assert_allclose(np.linalg.norm(back, axis=2), np.linalg.norm(x, axis=2), rtol=1e-3)
    assert np.isfinite(TurboQuant(2, 2).back(0 * x, "v")).all()


def test_levels() -> None:
    """For wide vectors those of a Gaussian."""
    np.testing.assert_allclose(codebook(1, 4096) * 64, [-0.798, 0.798], atol=2e-3)
    np.testing.assert_allclose(codebook(2, 4096) * 64, [-1.510, -0.453, 0.453, 1.510], atol=2e-3)


def test_true_bits() -> None:
    """What the formats' records take, over their values."""
    narrow, wide = [(0, Shape(64, 64, 3))], [(0, Shape(128, 128, 2)), (1, Shape(128, 128, 2))]
    assert true_bits(Blocks(4), narrow) == 4.5
    assert true_bits(KVarN(2, 2), wide) == 2.375  # 128 * 128 codes and 3 * 128 numbers in a tile
    assert true_bits(KVarN(4, 2), narrow) == (4 + 0.5 + 2 + 0.625) / 2
    assert true_bits(TurboQuant(3, 3), wide) == 3.125
    assert true_bits(recipe("turbo8-2"), narrow) == (8.5 + 2.25) / 2
    assert true_bits(Exact(), narrow) == 16


def test_names() -> None:
    assert recipes(RECIPES)["kvarn4-2"] == KVarN(4, 2)
    assert recipe("turbor3-2") == TurboQuant(3, 2, random=True)
    with pytest.raises(argparse.ArgumentTypeError, match="recipe 'turbo': must be exact"):
        recipe("turbo")
