"""KL divergence of logits, against the definition in double precision."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xquant_gguf.divergence import Expected, log_sums


def exact(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    x, y = (rows.astype(np.longdouble) for rows in (a, b))
    logp, logq = (rows - np.log(np.exp(rows).sum(1, keepdims=True)) for rows in (x, y))
    return np.asarray((np.exp(logp) * (logp - logq)).sum(1), np.float64)


def test_divergences_are_exact() -> None:
    """To 1e-7, which is less than what the order of a model's own sums changes; measured: 3e-8."""
    rng = np.random.default_rng(0)
    for n_vocab, spread, change in ((2, 1, 1), (300, 3, 0.1), (50000, 5, 0.01), (50000, 5, 1e-3)):
        a = (rng.standard_normal((4, n_vocab)) * spread + 20).astype(np.float32)
        b = (a + rng.standard_normal(a.shape) * change).astype(np.float32)
        np.testing.assert_allclose(Expected(a).kld(b), exact(a, b), rtol=1e-4, atol=1e-7)


def test_what_is_the_same_does_not_diverge() -> None:
    logits = np.random.default_rng(1).standard_normal((5, 1000)).astype(np.float32) * 4
    assert (Expected(logits).kld(logits) == 0).all()
    np.testing.assert_allclose(Expected(logits).kld(logits + 7), 0, atol=1e-6)


def test_logits_are_copied() -> None:
    """Those of a context are valid until its next decode."""
    a, b = np.random.default_rng(2).standard_normal((2, 3, 50)).astype(np.float32)
    expected, want = Expected(a), exact(a, b)
    best = a.argmax(1)
    a[:] = 0
    np.testing.assert_allclose(expected.kld(b), want, rtol=1e-5)
    assert (expected.best == best).all()


def test_log_sums() -> None:
    x = np.array([[0, 0, 0, 0], [1000, 1000, -1000, 0]], np.float32)
    np.testing.assert_allclose(log_sums(x), [np.log(4), 1000 + np.log(2)])
    expected = Expected(x)
    np.testing.assert_allclose(expected.kld(x, log_sums(x)), expected.kld(x))
