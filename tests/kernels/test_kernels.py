"""Every kernel set at the C ABI: what the Python codec refuses or never does, and no byte outside of its arrays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from xquant_gguf import codec, native, reference
from xquant_gguf.plan import PAGE, Side, side_to_c

GUARD = 0xA5
GAP = 24  # elements between the rows of a strided matrix
ALL = np.ones(PAGE, bool)
V_SIDES = (Side(2, 0, "lloyd", "log8", True, -1, 0.09), Side(3, 32, "paper", eta=0.09), Side(0, 0))
K_SIDES = (Side(4, 128), Side(3, 32, "clip", "log8"), Side(1, 64, "lloyd"), Side(0, 32))
CASES = [("k", side) for side in K_SIDES] + [("v", side) for side in V_SIDES]


@pytest.fixture(params=codec.kernel_sets(), autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each test runs with each kernel set of this machine."""
    with codec.force_kernels(request.param):
        yield request.param


def c_side(side: Side) -> Any:
    ffi, _ = native.load()
    c = ffi.new("xq_side *")
    side_to_c(c, side, "side")
    return c


def pointer(ctype: str, array: NDArray[Any]) -> Any:
    return native.load()[0].from_buffer(ctype, array)


def words(valid: NDArray[np.bool_]) -> NDArray[np.uint32]:
    return np.packbits(valid, bitorder="little").view(np.uint32)


def not_mapped(name: str) -> list[Any]:
    """The last argument of the functions for values."""
    return [native.load()[0].NULL] if name == "v" else []


def strided(rows: NDArray[np.float16]) -> NDArray[np.float16]:
    """The same rows, GAP not-a-numbers apart."""
    out = np.full((PAGE, rows.shape[1] + GAP), np.nan, np.float16)
    out[:, : rows.shape[1]] = rows
    return out


def seal(name: str, side: Side, rows: NDArray[np.float16], valid: NDArray[np.bool_]) -> tuple[bytes, bytes, int]:
    """As reference.seal_*, from strided rows into guarded buffers."""
    ffi, lib = native.load()
    width = rows.shape[1]
    sizes = [len(part) for part in getattr(reference, f"seal_{name}")(side, rows, valid)[:2]]
    parts = [np.full(size + 64, GUARD, np.uint8) for size in sizes]
    c, p = (pointer("uint8_t[]", part) for part in parts)
    x = strided(rows)
    status = getattr(lib, f"xq_seal_{name}")(
        c_side(side), width, pointer("uint16_t[]", x), width + GAP, pointer("uint32_t[]", words(valid)), c, p,
        ffi.NULL, 0, *not_mapped(name),
    )  # fmt: skip
    assert status >= 0, native.error()
    assert all((part[size:] == GUARD).all() for part, size in zip(parts, sizes, strict=True))
    codes, param = (part[:size].tobytes() for part, size in zip(parts, sizes, strict=True))
    return codes, param, status


@pytest.mark.parametrize(("name", "side"), CASES)
@pytest.mark.parametrize("width", [64, 96, 512])
def test_strided_rows_and_inputs_that_are_not_finite(name: str, side: Side, width: int) -> None:
    rng = np.random.default_rng(width)
    rows = rng.standard_normal((PAGE, width)).astype(np.float16)
    for value in (np.nan, np.inf, -np.inf, 65504):
        rows[rng.integers(PAGE, size=5), rng.integers(width, size=5)] = value
    for valid in (ALL, rng.random(PAGE) < 0.5, ~ALL):
        assert seal(name, side, rows, valid) == getattr(reference, f"seal_{name}")(side, rows, valid)


@pytest.mark.parametrize(("name", "side"), CASES)
@pytest.mark.parametrize("width", [64, 96, 512])
def test_unseal_of_any_codes_and_parameters(name: str, side: Side, width: int) -> None:
    """Random bytes, so subnormal, huge and negative scales too, into strided rows; the gaps stay."""
    _, lib = native.load()
    rng = np.random.default_rng(width)
    zero = np.zeros((PAGE, width), np.float16)
    codes, param, _ = getattr(reference, f"seal_{name}")(side, zero, ALL)
    codes = rng.bytes(len(codes))
    if side.bits == 0 or side.param == "f16":
        halves = rng.integers(0, 0x7C00, len(param) // 2) | rng.integers(0, 2, len(param) // 2) << 15
        param = halves.astype(np.uint16).tobytes()
    else:
        numbers = np.frombuffer(rng.bytes(len(param)), np.uint8).reshape(-1, 2, PAGE if name == "v" else width).copy()
        numbers[:, 0] = np.maximum(numbers[:, 0], 1)
        param = numbers.tobytes()
    out = np.full((PAGE, width + GAP), np.nan, np.float16)
    buffers = [pointer("uint8_t[]", np.frombuffer(part or b"\0", np.uint8)) for part in (codes, param)]
    call = getattr(lib, f"xq_unseal_{name}")
    at = pointer("uint16_t[]", out)
    status = call(c_side(side), width, buffers[0], side.bits, buffers[1], at, width + GAP, *not_mapped(name))
    assert status == 0, native.error()
    exact = getattr(reference, f"dequantize_{name}")(side, width, codes, param)
    expected = np.clip(exact, -65504, 65504).astype(np.float16)
    assert np.array_equal(out[:, :width].view(np.uint16), expected.view(np.uint16))
    assert np.isnan(out[:, width:]).all()


@pytest.mark.parametrize("name", ["k", "v"])
def test_bad_arguments_are_named(name: str, kernels: str) -> None:
    ffi, lib = native.load()
    rows, codes, param = np.zeros((PAGE, 64), np.uint16), np.zeros(8192, np.uint8), np.zeros(8192, np.uint8)
    valid = words(ALL)
    good: dict[str, Any] = {
        "side": c_side(Side(4, 32)),
        "width": 64,
        "rows": pointer("uint16_t[]", rows),
        "stride": 64,
        "valid": pointer("uint32_t[]", valid),
        "codes": pointer("uint8_t[]", codes),
        "param": pointer("uint8_t[]", param),
        "owner_codes": ffi.NULL,
        "owner_bits": 0,
    }
    call = getattr(lib, f"xq_seal_{name}")
    before = lib.xq_kernels_calls(kernels.encode())
    borrowing = {"side": c_side(Side(4, 32, owner=0)), "owner_codes": good["codes"]}
    for change, message in (
        ({"side": ffi.NULL}, "side, rows and param"),
        ({"rows": ffi.NULL}, "side, rows and param"),
        ({"param": ffi.NULL}, "side, rows and param"),
        ({"valid": ffi.NULL}, "valid must not be null"),
        ({"codes": ffi.NULL}, "codes must not be null for 4 bits"),
        ({"width": 0}, "head width is 0"),
        ({"width": 592, "stride": 592}, "head width is 592"),
        ({"stride": 63}, "with rows 63 apart"),
        ({"stride": -64}, "with rows -64 apart"),
        ({**borrowing, "owner_codes": ffi.NULL, "owner_bits": 4}, "codes must not be null for 4 bits"),
        ({**borrowing, "owner_bits": 2}, "codes of 2 bits do not fit a side of 4 bits"),
    ):
        assert call(*{**good, **change}.values(), *not_mapped(name)) < 0, message
        assert message in native.error()
    assert lib.xq_kernels_calls(kernels.encode()) == before  # nothing ran
    assert call(*good.values(), *not_mapped(name)) == 0
    assert lib.xq_kernels_calls(kernels.encode()) == before + 1


def test_hadamard_and_forcing_name_what_is_wrong() -> None:
    ffi, lib = native.load()
    x = pointer("float[]", np.zeros(16, np.float32))
    for arguments, message in (
        ((ffi.NULL, 1, 16), "x must not be null"),
        ((x, -1, 16), "n_rows is -1"),
        ((x, 1, 0), "n is 0"),
    ):
        assert lib.xq_hadamard(*arguments) < 0
        assert message in native.error()
    assert lib.xq_kernels_force(ffi.NULL) < 0
    assert "null" in native.error()
    assert lib.xq_kernels_calls(b"mmx") == 0


def test_parts_of_attention() -> None:
    """Threads have work, merging does not grow beyond its gain, and more pages never want fewer parts: memory for the
    most pages is enough for all."""
    parts = native.load()[1].xq_cpu_parts
    for n_groups in (1, 2, 3, 8, 32, 200):
        for n_threads in (1, 2, 6, 8, 12, 16, 64):
            found = [parts(n_groups, n_pages, n_threads) for n_pages in range(1, 600)]
            assert found == sorted(found)
            assert all(1 <= n <= n_pages for n_pages, n in enumerate(found, 1))
            assert found[-1] * n_groups >= min(n_threads, 16)  # beyond, one thread would merge for too long
            assert n_threads > 1 or set(found) == {1}
    assert parts(3, 100, 0) == 1  # llama.cpp takes its default then
    for n_pages, n_threads in ((32, 16), (128, 8)):  # measured: more are slower
        assert parts(2, n_pages, n_threads) < 9
