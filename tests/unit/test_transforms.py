"""Coordinates for keys: what errors of codes do to scores there, and that scores are the same."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from xquant_gguf import codec
from xquant_gguf.plan import PAGE
from xquant_gguf.sides import KeyForm, read_back_keys
from xquant_gguf.transforms import balanced, page_covariance

Array = NDArray[np.float64]


def moments(d: int, seed: int) -> tuple[Array, Array]:
    """Of keys and queries whose channels have sizes of their own, correlated."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(2):
        x = rng.standard_normal((8 * d, d)) @ (rng.standard_normal((d, d)) * np.exp(rng.standard_normal(d)))
        out.append(x.T @ x / len(x))
    return out[0], out[1]


def harm(m: Array, keys: Array, queries: Array) -> float:
    """What codes of a number of bits do to scores in coordinates M, but for a factor."""
    inverse = np.linalg.inv(m)
    return float(np.sum(np.diag(m @ keys @ m.T) * np.diag(inverse.T @ queries @ inverse)))


@pytest.mark.parametrize("d", [64, 80, 96])
def test_errors_of_all_channels_weigh_little_and_alike(d: int) -> None:
    keys, queries = moments(d, d)
    m = balanced(keys, queries).astype(np.float64)
    hadamard = codec.hadamard(np.eye(d, dtype=np.float32)).astype(np.float64)
    assert harm(m, keys, queries) < 0.7 * min(harm(np.eye(d), keys, queries), harm(hadamard, keys, queries))
    inverse = np.linalg.inv(m)
    weights = np.diag(m @ keys @ m.T) * np.diag(inverse.T @ queries @ inverse)
    assert weights.max() < 3 * weights.mean()  # 96: in blocks of 32
    # no other coordinates of equal bits do better: a few steps to any side do worse
    rng = np.random.default_rng(1)
    for _ in range(10):
        other = (np.eye(d) + 0.1 * rng.standard_normal((d, d)) / d**0.5) @ m
        assert harm(other, keys, queries) > 0.98 * harm(m, keys, queries)


def test_offsets_of_a_page_are_no_variance() -> None:
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((4 * PAGE, 8))
    moved = rows + np.repeat(100 * rng.standard_normal((4, 8)), PAGE, axis=0)
    found = page_covariance(moved.astype(np.float16))
    np.testing.assert_allclose(found, page_covariance(rows.astype(np.float16)), atol=5e-3)


def test_keys_come_back_from_their_coordinates() -> None:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((2, 3 * PAGE, 64)).astype(np.float16)
    matrices = np.stack([balanced(*moments(64, seed)) for seed in (4, 5)])
    form = KeyForm(matrices=matrices)
    back = form.plain(form.stored(rows)).astype(np.float32)
    np.testing.assert_allclose(back, rows.astype(np.float32), atol=0.02)
    fine = read_back_keys(form.side(4), rows, form)
    assert (fine[:, :PAGE] == rows[:, :PAGE]).all()
    error = ((fine.astype(np.float32) - rows.astype(np.float32))[:, PAGE:] ** 2).mean()
    assert 1e-4 < error < 0.5


def test_sizes_of_channels_do_not_matter() -> None:
    keys, queries = moments(64, 6)
    sizes = np.exp(2 * np.random.default_rng(7).standard_normal(64))
    scaled = keys * np.outer(sizes, sizes), queries / np.outer(sizes, sizes)
    found = harm(balanced(*scaled).astype(np.float64), *scaled)
    np.testing.assert_allclose(found, harm(balanced(keys, queries).astype(np.float64), keys, queries), rtol=0.02)


def test_heads_without_keys_or_queries_stay_as_they_are() -> None:
    keys, queries = moments(64, 8)
    for pair in ((np.zeros_like(keys), queries), (keys, np.zeros_like(queries))):
        assert (balanced(*pair) == np.eye(64)).all()
    keys[3] = keys[:, 3] = 0  # one channel that is constant
    assert np.isfinite(balanced(keys, queries)).all()
    assert np.isfinite(np.linalg.inv(balanced(keys, queries).astype(np.float64))).all()
