"""The native codec against the numpy reference, byte for byte, for every kernel set of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.codec_rows import GOLDEN, KINDS, made_rows
from xquant_gguf import codec, reference
from xquant_gguf.plan import PAGE, Side

SETS = codec.kernel_sets()


@st.composite
def sides(draw: st.DrawFn, is_k: bool) -> tuple[Side, int]:
    """A valid side that owns its codes or borrows them, and a head width."""
    width = draw(st.sampled_from((16, 64, 80, 96, 128, 256)))
    bits, borrows = draw(st.integers(0, 4)), draw(st.booleans())
    borrows = borrows and bits > 0
    groups = [g for g in (32, 64, 128) if is_k or width % g == 0 or g > width] + ([] if is_k else [0])
    fit = draw(st.sampled_from(("paper", "minmax", "lsq") if borrows else ("paper", "minmax", "clip", "lloyd")))
    param = "f16" if borrows else draw(st.sampled_from(("f16", "log8")))
    eta = draw(st.sampled_from((0.0, 0.02, 0.045, 0.09, 1 / 6, 0.3)))
    rotate = draw(st.booleans())
    return Side(bits, draw(st.sampled_from(groups)), fit, param, rotate, 0 if borrows else -1, eta), width


@pytest.mark.parametrize("kernels", SETS)
@pytest.mark.parametrize("name", ["k", "v"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_seal_and_unseal_match_the_reference(kernels: str, name: str, data: st.DataObject) -> None:
    side, width = data.draw(sides(name == "k"))
    rows = made_rows(data.draw(st.sampled_from(KINDS)), width, data.draw(st.integers(0, 99)))
    valid = np.random.default_rng(data.draw(st.integers(0, 99))).random(PAGE) < data.draw(
        st.sampled_from((0.1, 0.9, 1))
    )
    owner = None
    if side.owner >= 0:
        other = made_rows("normal", width, 1000)
        owner = getattr(reference, f"seal_{name}")(Side(side.bits, side.group), other, np.ones(PAGE, bool))[0]
    with codec.force_kernels(kernels):
        codes, param = getattr(codec, f"seal_{name}")(side, rows, valid, owner)
        expected_codes, expected_param, bad = getattr(reference, f"seal_{name}")(side, rows, valid, owner)
        assert bad == 0
        assert param == expected_param
        assert codes == expected_codes
        read = codes if owner is None else owner
        out = getattr(codec, f"unseal_{name}")(side, width, read, param)
    exact = getattr(reference, f"dequantize_{name}")(side, width, read, param)
    expected = np.clip(exact, -65504, 65504).astype(np.float16)
    assert np.array_equal(out.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("kernels", SETS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_mapped_values_match_the_reference(kernels: str, data: st.DataObject) -> None:
    """Predict from a source, seal and unseal what is left over: the same bytes as the reference."""
    side, width = data.draw(sides(False).filter(lambda case: case[0].owner < 0))
    bits = data.draw(st.integers(0, 4))
    source = Side(bits, 0, "lloyd", "log8", True, -1, 0.09) if bits else Side(0, 0)
    seed = data.draw(st.integers(0, 99))
    rows, other = (made_rows(data.draw(st.sampled_from(KINDS)), width, seed + i) for i in range(2))
    weight = (np.random.default_rng(seed).standard_normal((width, width)) / width**0.5).astype(np.float32)
    with codec.force_kernels(kernels):
        stored = codec.seal_v(source, other)
        predicted = codec.predict_v(source, width, *stored, weight)
        assert np.array_equal(predicted, reference.predict_v(source, width, *stored, weight))
        sealed = codec.seal_v(side, rows, predicted=predicted)
        assert sealed == reference.seal_v(side, rows, np.ones(PAGE, bool), None, predicted)[:2]
        out = codec.unseal_v(side, width, *sealed, predicted)
    exact = reference.dequantize_v(side, width, *sealed, predicted)
    assert np.array_equal(out, np.clip(exact, -65504, 65504).astype(np.float16))


@pytest.mark.parametrize("kernels", SETS)
@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
def test_a_map_of_a_hostile_page_predicts_finite_values(kernels: str) -> None:
    """A loaded state may hold any codes and parameters: infinite ones, and not-a-numbers (found by the fuzzer)."""
    width, source, side = 64, Side(2, 0), Side(2, 0, "minmax", "f16", True, source=0)
    rng = np.random.default_rng(8)
    weight = np.where(rng.random((width, width)) < 0.1, 3e38, 1).astype(np.float32)
    rows = made_rows("normal", width, 1)
    codes, param = reference.seal_v(source, rows, np.ones(PAGE, bool))[:2]
    hostile = rng.choice(np.array([0x7C00, 0xFC00, 0x7E00, 0x3C00], "<u2"), len(param) // 2).tobytes()
    with codec.force_kernels(kernels):
        predicted = codec.predict_v(source, width, codes, hostile, weight)
        assert np.array_equal(predicted, reference.predict_v(source, width, codes, hostile, weight))
        sealed = codec.seal_v(side, rows, predicted=predicted)
    assert np.abs(predicted).max() == 65504
    assert sealed == reference.seal_v(side, rows, np.ones(PAGE, bool), None, predicted)[:2]


@pytest.mark.parametrize("kernels", SETS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_pack_and_unpack(kernels: str, data: st.DataObject) -> None:
    bits = data.draw(st.integers(1, 4))
    n_i, n_j = (16 * data.draw(st.integers(1, 9)) for _ in range(2))
    codes = np.random.default_rng(n_i * n_j).integers(0, 2**bits, (n_i, n_j), dtype=np.uint8)
    with codec.force_kernels(kernels):
        packed = codec.pack(codes, bits)
        assert packed == reference.pack(codes, bits)
        assert np.array_equal(codec.unpack(packed, bits, n_i, n_j), codes)
    assert np.array_equal(reference.unpack(packed, bits, n_i, n_j), codes)


def test_the_place_of_one_code() -> None:
    """The order of native/include/xquant.h, spelled out for one code of each width."""
    for bits, unit in ((4, 8), (2, 16), (1, 32)):
        codes = np.zeros((64, 32), np.uint8)
        i, j = 43, 21
        codes[i, j] = 1
        n_units = 64 // unit
        byte = (j // 16 * n_units + i // unit) * 64 + 4 * (j % 16) + i % 4
        shift = bits * (i % unit // 4)
        assert reference.pack(codes, bits)[byte] == 1 << shift


@pytest.mark.parametrize("kernels", SETS)
def test_golden_vectors(kernels: str) -> None:
    """Both codecs still give what tools/make_golden.py stored: they cannot drift together."""
    for case in json.loads(GOLDEN.read_text()):
        side = Side(**case["side"])
        rows = np.frombuffer(bytes.fromhex(case["rows"]), np.float16).reshape(PAGE, -1)
        owner = None if case["owner_codes"] is None else bytes.fromhex(case["owner_codes"])
        stored = bytes.fromhex(case["codes"]), bytes.fromhex(case["param"])
        assert getattr(reference, f"seal_{case['name']}")(side, rows, np.ones(PAGE, bool), owner)[:2] == stored
        with codec.force_kernels(kernels):
            assert getattr(codec, f"seal_{case['name']}")(side, rows, None, owner) == stored


@pytest.mark.parametrize(("bits", "ceiling"), [(4, 0.107), (3, 0.193), (2, 0.345), (1, 0.603), (0, 1.0)])
def test_error_ceiling_of_each_width(bits: int, ceiling: float) -> None:
    """Rotated Gaussian values, one group a head: not worse than the best fixed uniform quantizer (Max, 1960).

    Root mean square error in units of the deviation, of the fit before it is lengthened; a fit to each group may do a
    little better.
    """
    rows = made_rows("normal", 128, 5)
    side = Side(bits, 0, "lloyd", "log8", True, -1, 0.3 if bits == 1 else 0.09)
    with mock.patch.object(reference, "LONGER_LLOYD", np.float32(0)):
        out = reference.dequantize_v(side, 128, *reference.seal_v(side, rows, np.ones(PAGE, bool))[:2])
    error = float(np.sqrt(np.mean((out - rows.astype(np.float32)) ** 2)))
    assert 0.8 * ceiling < error <= 1.01 * ceiling


@pytest.mark.parametrize("name", ["k", "v"])
def test_constant_groups_are_kept(name: str) -> None:
    rows = np.full((PAGE, 64), 1.7, np.float16)
    for param, tolerance in (("f16", 0.0), ("log8", 1.7 / 15)):
        side = Side(2, 64, "minmax", param)
        out = getattr(codec, f"unseal_{name}")(side, 64, *getattr(codec, f"seal_{name}")(side, rows))
        assert np.abs(out.astype(np.float32) - rows.astype(np.float32)).max() <= tolerance


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_inputs_that_are_not_finite_are_counted(value: float) -> None:
    rows = made_rows("normal", 64, 0)
    rows[3, 5] = rows[70, 6] = value
    with pytest.raises(ValueError, match="2 numbers that are not finite"):
        codec.seal_k(Side(4, 128), rows)
    _, param, bad = reference.seal_k(Side(4, 128), rows, np.ones(PAGE, bool))
    assert bad == 2
    assert np.isfinite(np.frombuffer(param, np.float16)).all()


@pytest.mark.parametrize("n", [16, 48, 64, 80, 96, 128, 256])
def test_hadamard_is_its_own_inverse(n: int) -> None:
    x = np.random.default_rng(n).standard_normal((3, n)).astype(np.float32)
    y = codec.hadamard(x)
    assert np.array_equal(y, reference.hadamard(x.T).T)
    assert np.allclose(codec.hadamard(y), x, atol=1e-6)
    assert np.allclose((y**2).sum(), (x**2).sum())


@pytest.mark.parametrize(
    ("side", "width", "message"),
    [
        (Side(5, 128), 64, "bits is 5, must be 0 to 4"),
        (Side(4, 48), 64, "group is 48, must be 32, 64 or 128 tokens"),
        (Side(4, 128, eta=0.5), 64, "eta is 0.5, must be in"),
        (Side(4, 128, eta=float("nan")), 64, "eta is -?nan, must be in"),
        (Side(4, 128, "lsq"), 64, "fit lsq is for borrowed codes"),
        (Side(4, 128), 72, "head width is 72, must be a multiple of 16"),
        (Side(4, 128), 592, "head width is 592, must be a multiple of 16"),
    ],
)
def test_bad_sides_are_named(side: Side, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codec.seal_k(side, np.zeros((PAGE, width), np.float16))


def test_bad_arrays_are_named() -> None:
    with pytest.raises(ValueError, match=r"rows have shape \(127, 64\)"):
        codec.seal_k(Side(4, 128), np.zeros((127, 64), np.float16))
    with pytest.raises(ValueError, match="code 4 does not fit 2 bits"):
        codec.pack(np.full((16, 16), 4), 2)
    with pytest.raises(ValueError, match="multiples of 16"):
        codec.pack(np.zeros((16, 17)), 2)
    with pytest.raises(ValueError, match="must have 64"):
        codec.unpack(bytes(63), 2, 16, 16)


@pytest.mark.parametrize("kernels", SETS)
def test_the_forced_set_really_ran(kernels: str) -> None:
    before = {name: codec.kernel_calls(name) for name in SETS}
    with codec.force_kernels(kernels):
        codec.seal_k(Side(4, 128), made_rows("normal", 64, 0))
    after = {name: codec.kernel_calls(name) for name in SETS}
    assert [name for name in SETS if after[name] > before[name]] == [kernels]


@pytest.mark.parametrize("kernels", ["mmx", "neon" if "scalar" in SETS and "avx2" in SETS else "avx2"])
def test_forcing_a_set_that_cannot_run_is_an_error(kernels: str, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=f'kernel set "{kernels}" .* this machine can run'),
        codec.force_kernels(kernels),
    ):
        pass
    out = subprocess.run(
        [sys.executable, "-c", "from xquant_gguf import codec; codec.kernels()"],
        env={**os.environ, "XQUANT_KERNELS": kernels},
        cwd=tmp_path,  # the installed package, not the source tree
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode != 0
    assert f'XQUANT_KERNELS: kernel set "{kernels}"' in out.stderr


def test_the_environment_chooses_the_set(tmp_path: Path) -> None:
    program = "from xquant_gguf import codec; print(codec.kernels())"
    env = {**os.environ, "XQUANT_KERNELS": "scalar"}
    command = [sys.executable, "-c", program]
    out = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "scalar"
