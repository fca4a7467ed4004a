"""The numpy reference against the definitions themselves: worked examples, brute force, and properties."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from xquant_gguf import reference
from xquant_gguf.plan import PAGE, Side

ALL = np.ones(PAGE, bool)


def normal(n: int, lanes: int, seed: int, shift: float = 0.0) -> NDArray[np.float32]:
    """One group a lane, [n][lanes]."""
    return (np.random.default_rng(seed).standard_normal((n, lanes)) + shift).astype(np.float32)


def squared_error(x: NDArray[np.float32], codes: Any, p: reference.Parameters) -> NDArray[np.float64]:
    """Of each lane, in double precision."""
    got = p.base.astype(np.float64) + p.scale * (codes.astype(np.float64) - float(p.middle))
    return ((got - x) ** 2).sum(axis=0)


def test_paper_worked_example() -> None:
    """arXiv 2510.11236, section 3.2, by hand: codes of the full range, levels moved inwards by eta."""
    x = np.array([[-1, 0, 2, 5, 4]], np.float32).T  # range 6
    codes, p = reference.quantize(x, Side(1, 32, "paper", eta=0.25))
    assert codes[:, 0].tolist() == [0, 0, 0, 1, 1]  # 2 is exactly half way: to the even code
    assert (p.base[0], p.scale[0]) == (0.5, 3.0)  # -1 + 6 / 4, 6 / 2
    codes, p = reference.quantize(x, Side(2, 32, "paper", eta=0.25))
    assert codes[:, 0].tolist() == [0, 0, 2, 3, 2]  # steps of 2; 0 and 4 are half way
    assert (p.base[0], p.scale[0]) == (0.5, 1.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.sampled_from((32, 64, 128)), st.integers(0, 10**6), st.floats(-300, 300))
def test_minmax_is_within_half_a_step(bits: int, n: int, seed: int, shift: float) -> None:
    """Of the values, but for the rounding of scale and zero to F16 (relative 2^-11 each)."""
    x = normal(n, 8, seed, shift)
    codes, p = reference.quantize(x, Side(bits, n))
    got = p.base + p.scale * codes
    bound = p.scale / 2 + (2**bits - 1) * p.scale * 2**-11 + np.abs(p.base) * 2**-11 + 1e-5 * np.abs(x).max()
    assert (np.abs(got - x) <= bound).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.sampled_from(("f16", "log8")), st.integers(0, 10**6))
def test_clip_is_the_best_of_its_ratios(bits: int, param: str, seed: int) -> None:
    x = normal(64, 8, seed)
    with mock.patch.object(reference, "LONGER_CLIP", np.float32(0)):
        best = squared_error(x, *reference.quantize(x, Side(bits, 64, "clip", param)))
    for eta in reference.CLIP_ONE_BIT if bits == 1 else reference.CLIP_MORE_BITS:
        other = squared_error(x, *reference.quantize(x, Side(bits, 64, "minmax", param, eta=eta)))
        assert (best <= other * (1 + 1e-4)).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.sampled_from((0.0, 0.09, 0.3)), st.integers(0, 10**6), st.floats(-50, 50))
def test_lloyd_improves_on_its_start(bits: int, eta: float, seed: int, shift: float) -> None:
    """A step of assignment and least squares cannot raise the error, but for F16's rounding of zero."""
    x = normal(128, 8, seed, shift)
    start = squared_error(x, *reference.quantize(x, Side(bits, 128, "minmax", eta=eta)))
    with mock.patch.object(reference, "LONGER_LLOYD", np.float32(0)):
        end = squared_error(x, *reference.quantize(x, Side(bits, 128, "lloyd", eta=eta)))
    slack = 128 * (np.abs(x).max() * 2**-11) ** 2
    assert (end <= 1.02 * start + 2 * slack).all()


def read_back(x: NDArray[np.float32], side: Side) -> NDArray[np.float32]:
    codes, p = reference.quantize(x, side)
    return p.base + p.scale * (codes.astype(np.float32) - p.middle)


@pytest.mark.parametrize("param", ["f16", "log8"])
@pytest.mark.parametrize(
    ("fit", "bits", "eta", "before"), [("lloyd", 1, 0.3, 0.65), ("lloyd", 2, 0.09, 0.91), ("clip", 2, 0.0, 0.91)]
)
def test_what_is_read_back_is_nearly_as_long_as_what_was_stored(
    fit: str, bits: int, eta: float, before: float, param: str
) -> None:
    """Sums over tokens keep a factor that all have in common; before: what least error alone gives."""
    x = normal(128, 256, 1)

    def length() -> float:
        return float((read_back(x, Side(bits, 128, fit, param, eta=eta)) * x).sum() / (x * x).sum())

    assert length() <= 1
    assert 1 - length() < 0.85 * (1 - before)
    with mock.patch.multiple(reference, LONGER_LLOYD=np.float32(0), LONGER_CLIP=np.float32(0)):
        assert length() <= before


@pytest.mark.parametrize("fit", ["lloyd", "clip"])
@pytest.mark.parametrize(("bits", "eta"), [(1, 0.3), (2, 0.09), (3, 0.02), (4, 0.01)])
def test_sealing_again_does_not_lengthen_again(fit: str, bits: int, eta: float) -> None:
    side = Side(bits, 128, fit, "f16", eta=eta)
    once = read_back(normal(128, 64, 2), side)
    again = once
    for _ in range(5):
        again = read_back(again, side)
    assert 0.98 <= (again * once).sum() / (once * once).sum() <= 1.001


@pytest.mark.parametrize("param", ["f16", "log8"])
@pytest.mark.parametrize(
    ("fit", "bits", "eta", "least", "most", "before"),
    [("clip", 2, 0.0, 0.7, 1.1, 0.55), ("lloyd", 3, 0.06, 0.95, 1.15, 0.88)],
)
def test_what_is_turned_between_two_seals_stays_as_long_as_it_was(
    fit: str, bits: int, eta: float, least: float, most: float, before: float, param: str
) -> None:
    """Keys of a context shift are codes, but turned they lie between codes like new ones: each seal would shorten them.

    Squared lengths after eight turns; before: what least error alone leaves."""
    turn = np.linalg.qr(normal(64, 64, 3))[0]
    side = Side(bits, 128, fit, param, eta=eta)

    def length() -> float:
        once = x = read_back(normal(128, 64, 4), side)
        for _ in range(8):
            x = read_back(x @ turn, side)
        return float((x * x).sum() / (once * once).sum())

    assert least < length() < most
    with mock.patch.multiple(reference, LONGER_LLOYD=np.float32(0), LONGER_CLIP=np.float32(0)):
        assert length() < before


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(0, 10**6))
def test_least_squares_for_borrowed_codes(bits: int, seed: int) -> None:
    """As numpy's own line through the points; a falling line gives a negative scale."""
    codes = np.random.default_rng(seed).integers(0, 2**bits, (64, 4), dtype=np.uint8)
    x = normal(64, 4, seed) - 0.5 * codes.astype(np.float32)
    kept, p = reference.quantize(x, Side(bits, 64, "lsq", owner=0), codes)
    assert kept is codes
    for lane in range(4):
        slope, start = np.polyfit(codes[:, lane].astype(float), x[:, lane].astype(float), 1)
        assert p.scale[lane] == pytest.approx(slope, rel=2e-3, abs=1e-4)
        assert p.base[lane] == pytest.approx(start, rel=2e-3, abs=1e-3)


def test_least_squares_for_codes_that_are_all_the_same() -> None:
    x = normal(32, 3, 0, 2.0)
    _, p = reference.quantize(x, Side(2, 32, "lsq", owner=0), np.full((32, 3), 2, np.uint8))
    assert (p.scale == 0).all()
    assert np.allclose(p.base, x.mean(axis=0), rtol=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(0, 10**6), st.sampled_from((1e-4, 1.0, 500.0)), st.sampled_from((0.0, 3.0, 90.0)))
def test_log8_is_the_nearest_step(bits: int, seed: int, size: float, shift: float) -> None:
    """e is the nearest to the logarithm of a scale that is large enough for the centre; q the nearest centre."""
    rng = np.random.default_rng(seed)
    scale = (size * rng.random(64) + size / 100).astype(np.float32)
    zero = (size * (rng.standard_normal(64) + shift)).astype(np.float32)
    p = reference.round_parameters(scale, zero, bits, "log8")
    assert p.e is not None
    assert p.q is not None
    centre = zero + scale.astype(np.float64) * (2**bits - 1) / 2
    least = np.maximum(scale, np.abs(centre) * 8 / 120)
    wanted = np.log2(least) * 8 + 161
    inside = (wanted > 1) & (wanted < 255)
    assert (np.abs(p.e - wanted)[inside] <= 0.5 + 1e-4).all()
    assert np.allclose(p.scale, 2.0 ** ((p.e - 161) / 8), rtol=1e-6)
    assert (np.abs(p.base - centre)[inside] <= p.scale[inside] / 16 * (1 + 1e-4)).all()


def test_log8_saturates() -> None:
    scale, zero = np.array([1e30, 1e-30, 0.0, 1.0], np.float32), np.array([0, 0, 0, 60000], np.float32)
    p = reference.round_parameters(scale, zero, 1, "log8")
    assert p.e is not None
    assert p.q is not None
    assert p.e.tolist() == [255, 1, 1, 255]
    assert p.q.tolist() == [127, 0, 0, 127]


@pytest.mark.parametrize("name", ["k", "v"])
def test_tokens_that_do_not_count_change_nothing(name: str) -> None:
    """Whatever lies there, not-a-numbers included: they take the value of the first token that counts."""
    seal = getattr(reference, f"seal_{name}")
    rows = normal(PAGE, 64, 1).astype(np.float16)
    valid = np.random.default_rng(2).random(PAGE) < 0.5
    junk = np.where(valid[:, None], rows, np.float16(np.nan))
    filled = np.where(valid[:, None], rows, rows[valid.argmax()])
    side = Side(2, 32, "clip")
    assert seal(side, junk, valid) == seal(side, filled, ALL)


def test_channels_of_keys_do_not_meet() -> None:
    """Permuted channels give permuted channels."""
    rows = normal(PAGE, 64, 3).astype(np.float16)
    order = np.random.default_rng(4).permutation(64)
    side = Side(3, 64, "lloyd")
    straight = reference.dequantize_k(side, 64, *reference.seal_k(side, rows, ALL)[:2])
    permuted = reference.dequantize_k(side, 64, *reference.seal_k(side, rows[:, order], ALL)[:2])
    assert np.array_equal(permuted, straight[:, order])


def test_no_bits_keep_the_mean() -> None:
    rows = normal(PAGE, 64, 5, 7.0).astype(np.float16)
    codes, param, _ = reference.seal_k(Side(0, 128), rows, ALL)
    out = reference.dequantize_k(Side(0, 128), 64, codes, param)
    assert codes == b""
    assert np.array_equal(out, np.broadcast_to(out[0], out.shape))
    assert np.allclose(out[0], rows.astype(np.float64).mean(axis=0), rtol=2**-10)


@pytest.mark.parametrize("n", [64, 80, 96])
def test_hadamard_is_sylvesters_matrix(n: int) -> None:
    block = n & -n
    matrix: NDArray[np.float64] = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    full = np.kron(np.eye(n // block), matrix / np.sqrt(block))
    x = normal(n, 5, n)
    assert np.allclose(reference.hadamard(x), full @ x, atol=1e-5)
