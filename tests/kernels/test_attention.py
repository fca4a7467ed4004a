"""Attention over pages of random codes against a float64 numpy reference, for every kernel set."""

from __future__ import annotations

import numpy as np
import pytest

from support.attention_cases import CASES, TOLERANCE, Case, Head, attend, expected
from xquant_gguf import codec, native
from xquant_gguf.plan import PAGE, Side, side_to_c

SETS = codec.kernel_sets()


@pytest.mark.parametrize("kernels", SETS)
@pytest.mark.parametrize("name", CASES)
def test_attention_matches_float64(kernels: str, name: str) -> None:
    case = CASES[name]
    head = Head(case)
    right = expected(case, head)
    exact = all(state != -1 for state in case.states)
    # mapped values are read from two sets of codes: two roundings add up
    tolerance = TOLERANCE["scalar" if exact else kernels] * (1 if case.source is None else 2)
    with codec.force_kernels(kernels):
        for parts in ((), (1,), (1, len(case.states) - 1)):
            out = attend(case, head, parts)
            assert np.abs(out - right).max() <= tolerance * np.abs(right).max()


@pytest.mark.parametrize("kernels", SETS)
def test_what_is_masked_may_be_anything(kernels: str) -> None:
    case = Case(states=(0, -1, 1), n_rows=5, masked=False)
    head = Head(case)
    head.mask[:, 10:50] = -np.inf
    head.mask[:, 2 * PAGE + 100 :] = -np.inf
    head.hidden = head.mask == -np.inf
    right = expected(case, head)
    for window in head.windows:
        window[0, 10:50] = np.nan
        window[1, 100:] = np.inf
    with codec.force_kernels(kernels):
        out = attend(case, head, ())
    assert np.abs(out - right).max() <= TOLERANCE[kernels] * np.abs(right).max()


@pytest.mark.parametrize("kernels", SETS)
def test_a_row_that_sees_nothing_gives_zeros(kernels: str) -> None:
    case = Case(n_rows=3)
    head = Head(case)
    head.mask[1] = -np.inf
    with codec.force_kernels(kernels):
        out = attend(case, head, (2,))
    assert np.array_equal(out[1], np.zeros(case.e))
    assert np.isfinite(out).all()
    assert np.abs(out[0]).max() > 0


@pytest.mark.parametrize("kernels", [name for name in SETS if name != "scalar"])
def test_rounding_of_peaked_attention(kernels: str) -> None:
    """One token holds half of the weight, the others share the rest: the hard case of one scale for a page of p."""
    case = Case(d=64, e=64, states=(-1,) * 8, n_rows=4, masked=False, seed=9)
    head = Head(case)
    keys = head.read[0]
    head.q[:] = (keys[300] / np.linalg.norm(keys[300]) * 24).astype(np.float32)
    right = expected(case, head)
    with codec.force_kernels(kernels):
        out = attend(case, head, ())
    assert np.linalg.norm(out - right) <= 0.02 * np.linalg.norm(right)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d": 72}, "head widths are 72 and 64"),
        ({"page_end": -1}, "pages 0 to -1"),
        ({"k_code_bits": 2}, "a sealed page needs codes"),
        ({"v_code_bits": 2134064445}, "a sealed page needs codes"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, int], message: str) -> None:
    ffi, lib = native.load()
    a = ffi.new("xq_attention *")
    buffer = ffi.new("uint8_t[65536]")
    a.d = a.e = 64
    side_to_c(a.k, Side(4, 128), "k")
    side_to_c(a.v, Side(2, 0), "v")
    a.k_code_bits, a.v_code_bits, a.page_end = 4, 2, 1
    for name in ("k_codes", "k_param", "v_codes", "v_param"):
        setattr(a, name, buffer)
    slot, rows = ffi.new("int32_t[1]", [-1]), ffi.new("float *[1]")
    a.page_slot, a.q, a.partial = slot, rows, rows
    a.k_window = a.v_window = ffi.cast("uint16_t *", buffer)
    for name, value in change.items():
        setattr(a, name, value)
    assert lib.xq_attend(a) < 0
    assert message in native.error()
    a.k.bits, a.v.bits = 0, 0  # nor does it matter where there are no codes (found by the fuzzer)
    assert lib.xq_attend(a) < 0
