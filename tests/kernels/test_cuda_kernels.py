"""The CUDA kernels through their C ABI: codes byte for byte as the reference makes them, attention against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from support import gpu
from xquant_gguf import reference
from xquant_gguf.plan import PAGE, Layer, Side

pytestmark = pytest.mark.cuda

HEADS, N_REP = 2, 4
# Largest error of an output in units of the largest output, over these cases.  "general" is single precision; "decode"
# rounds queries, and vectors that are multiplied with codes, to F16 or 16-bit integers, which the constant parts of
# these keys make felt.  Measured: 3.7e-6, 3.2e-3.
TOLERANCE = {"general": 1e-5, "decode": 5e-3}

V = Side(2, 0, "lloyd", "log8", True, eta=0.09)
Window = tuple[NDArray[np.float16], NDArray[np.float16]]


def window_of(rng: np.random.Generator, d: int, e: int, slots: int) -> Window:
    """Keys with constant parts and outliers, values without; [head][slot][PAGE][width]."""
    k, v = (rng.standard_normal((HEADS, slots, PAGE, n), dtype=np.float32) for n in (d, e))
    k = (k * rng.lognormal(0, 0.7, d) + 3 * rng.standard_normal(d)).astype(np.float32)
    return k.astype(np.float16), v.astype(np.float16)


def valid_tokens(rng: np.random.Generator, full: bool) -> NDArray[np.bool_]:
    valid = np.ones(PAGE, bool) if full else rng.random(PAGE) < 0.5
    valid[rng.integers(PAGE)] = True
    return valid


def own_sides() -> list[Layer]:
    sides: list[Layer] = []
    for bits in range(5):
        for fit in ("paper", "minmax", "clip", "lloyd"):
            for param in ("f16",) if bits == 0 else ("f16", "log8"):
                k = Side(bits, (32, 64, 128)[len(sides) % 3], fit, param, eta=0.05)
                sides.append(Layer(k, replace(k, group=(0, 32)[len(sides) % 2], rotate=len(sides) % 3 > 0)))
    return sides


@pytest.mark.parametrize("layer", own_sides(), ids=str)
@pytest.mark.parametrize(("d", "e"), [(64, 128), (96, 64), (80, 96)])
def test_sealed_pages_are_the_reference_byte_for_byte(layer: Layer, d: int, e: int) -> None:
    if layer.v.group and e % layer.v.group:
        pytest.skip("the group does not divide the width")
    rng = np.random.default_rng(d + e)
    window = window_of(rng, d, e, 3)
    window[0][:, 1, 5, 3], window[1][:, 1, 7, 2] = np.inf, np.nan
    window[0][:, 2], window[1][:, 2] = 0.25, 0.0  # constant groups
    gpu_layer = gpu.DeviceLayer(layer, window, 5)
    seals = [(p, s, valid_tokens(rng, s != 0)) for p, s in ((3, 0), (0, 1), (4, 2))]
    gpu_layer.update(seals)
    at = gpu_layer.layout
    for page, slot, valid in seals:
        for head in range(HEADS):
            block = gpu_layer.block(head, page)
            for rows, side, seal, codes_at, param_at in (
                (window[0], layer.k, reference.seal_k, at.k_codes, at.k_param),
                (window[1], layer.v, reference.seal_v, at.v_codes, at.v_param),
            ):
                codes, param, _ = seal(side, rows[head, slot], valid)
                assert side.bits == 0 or block[codes_at : codes_at + len(codes)].tobytes() == codes
                assert block[param_at : param_at + len(param)].tobytes() == param


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("fit", ["paper", "minmax", "lsq"])
def test_borrowed_codes(bits: int, fit: str) -> None:
    rng = np.random.default_rng(bits)
    own = Layer(Side(bits, 128), Side(bits, 0, "minmax", "f16", True))
    borrowed = Layer(Side(bits, 128, fit, owner=0, eta=0.1), Side(bits, 0, fit, "f16", True, 0, 0.1))
    windows = [window_of(rng, 64, 64, 1) for _ in range(2)]
    owner = gpu.DeviceLayer(own, windows[0], 2)
    reader = gpu.DeviceLayer(borrowed, windows[1], 2, owner=owner)
    valid = valid_tokens(rng, False)
    owner.update([(1, 0, valid)])
    reader.update([(1, 0, valid)])
    for head in range(HEADS):
        block = reader.block(head, 1)
        for i, seal in enumerate((reference.seal_k, reference.seal_v)):
            codes, _, _ = seal((own.k, own.v)[i], windows[0][i][head, 0], valid)
            _, param, _ = seal((borrowed.k, borrowed.v)[i], windows[1][i][head, 0], valid, codes)
            at = (reader.layout.k_param, reader.layout.v_param)[i]
            assert block[at : at + len(param)].tobytes() == param
    q = rng.standard_normal((1, HEADS * N_REP, 64), dtype=np.float32)
    rows = [exact_rows(reader, [gpu.FREE, gpu.SEALED], name) for name in "kv"]
    mask = np.zeros((1, 2 * PAGE), np.float16)
    mask[:, :PAGE] = -np.inf
    check_attention(reader, q, [gpu.FREE, gpu.SEALED], mask, rows[0], rows[1])


def exact_rows(device: gpu.DeviceLayer, table: list[int], name: str) -> NDArray[np.float32]:
    """Keys or values [head][cell][width] as pages store them, by the reference, not rounded to F16."""
    side = getattr(device.layer, name)
    window, width = (device.rows()[0], device.d) if name == "k" else (device.rows()[1], device.e)
    out = np.zeros((device.heads, len(table), PAGE, width), np.float32)

    def parts(of: gpu.DeviceLayer, head: int, page: int) -> tuple[bytes, bytes]:
        """Codes and parameters."""
        codes_of = of.owner if name == "k" or of.layer.v.owner >= 0 else of
        block, at = codes_of.block(head, page), getattr(codes_of.layout, f"{name}_codes")
        n_i, n_j = (of.d, PAGE) if name == "k" else (PAGE, of.e)
        n_codes = len(reference.pack(np.zeros((n_i, n_j), np.uint8), side_of(of).bits)) if side_of(of).bits else 0
        param_at, side = getattr(of.layout, f"{name}_param"), side_of(of)
        n_groups = n_j // (side.group if 0 < side.group < n_j else n_j)
        n_param = n_groups * n_i * (4 if side.param == "f16" and side.bits else 2)
        return block[at : at + n_codes].tobytes(), of.block(head, page)[param_at : param_at + n_param].tobytes()

    def side_of(of: gpu.DeviceLayer) -> Side:
        return of.layer.k if name == "k" else of.layer.v

    for page, state in enumerate(table):
        for head in range(device.heads):
            if state >= 0:
                out[head, page] = window[head, state]
            elif state == gpu.SEALED:
                codes, param = parts(device, head, page)
                if name == "k":
                    out[head, page] = reference.dequantize_k(side, width, codes, param)
                    continue
                predicted = None
                if device.source is not None and device.map is not None:
                    heads, weight = device.map
                    from_source = parts(device.source, int(heads[head]), page)
                    predicted = reference.predict_v(device.source.layer.v, width, *from_source, weight[head])
                out[head, page] = reference.dequantize_v(side, width, codes, param, predicted)
    return out.reshape(device.heads, -1, width)


def mapped(
    rng: np.random.Generator, e: int, bits: int, large: float = 0.0
) -> tuple[gpu.DeviceLayer, gpu.DeviceLayer, list[Window]]:
    """A layer whose values another predicts; page 1 of both sealed from slot 0.  large: a tenth of its map."""
    source_side = Side(2, 0, "lloyd", "log8", True, eta=0.09)
    side = Side(bits, 0, "lloyd" if bits else "minmax", "log8" if bits else "f16", True, source=0, eta=0.1)
    heads = np.array([1, 0], np.int32)
    map_ = (rng.standard_normal((HEADS, e, e)) / e**0.5).astype(np.float32)
    if large:
        map_[rng.random(map_.shape) < 0.1] = large
    windows = [window_of(rng, e, e, 1) for _ in range(2)]
    source = gpu.DeviceLayer(Layer(Side(4, 128), source_side), windows[0], 2)
    reader = gpu.DeviceLayer(Layer(Side(4, 128), side), windows[1], 2, source=source, map_=(heads, map_))
    for layer in (source, reader):
        layer.update([(1, 0, np.ones(PAGE, bool))])
    return source, reader, windows


def check_mapped(source: gpu.DeviceLayer, reader: gpu.DeviceLayer, windows: list[Window]) -> float:
    """Page 1 of the reader is the reference's byte for byte; returns the largest prediction."""
    assert reader.map is not None
    heads, map_ = reader.map
    valid, largest = np.ones(PAGE, bool), 0.0
    for head in range(HEADS):
        codes, param, _ = reference.seal_v(source.layer.v, windows[0][1][heads[head], 0], valid)
        predicted = reference.predict_v(source.layer.v, source.e, codes, param, map_[head])
        codes, param, _ = reference.seal_v(reader.layer.v, windows[1][1][head, 0], valid, None, predicted)
        block, at = reader.block(head, 1), reader.layout
        assert reader.layer.v.bits == 0 or block[at.v_codes : at.v_codes + len(codes)].tobytes() == codes
        assert block[at.v_param : at.v_param + len(param)].tobytes() == param
        largest = max(largest, float(np.abs(predicted).max()))
    return largest


@pytest.mark.parametrize("bits", [0, 2])
@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
def test_predictions_that_are_not_finite_are_clamped(bits: int) -> None:
    """Products overflow, and infinities of both signs make not-a-numbers."""
    source, reader, windows = mapped(np.random.default_rng(bits), 64, bits, 3e38)
    assert check_mapped(source, reader, windows) == 65504
    want = np.clip(exact_rows(reader, [gpu.FREE, gpu.SEALED], "v"), -65504, 65504).astype(np.float16)
    np.testing.assert_array_equal(reader.unpack([gpu.FREE, gpu.SEALED], False), want)


@pytest.mark.parametrize("bits", [0, 1, 2])
@pytest.mark.parametrize("e", [64, 128])
def test_mapped_values(bits: int, e: int) -> None:
    rng = np.random.default_rng(bits)
    source, reader, windows = mapped(rng, e, bits)
    check_mapped(source, reader, windows)
    rows = [exact_rows(reader, [0, gpu.SEALED], name) for name in "kv"]
    q = rng.standard_normal((2, HEADS * N_REP, e), dtype=np.float32)
    check_attention(reader, q, [0, gpu.SEALED], None, rows[0], rows[1])


def test_pages_are_opened_again_and_rows_written() -> None:
    rng = np.random.default_rng(1)
    layer = Layer(Side(3, 64), V)
    window = window_of(rng, 64, 128, 3)
    device = gpu.DeviceLayer(layer, window, 4)
    device.update([(2, 1, np.ones(PAGE, bool))])
    at_cells = np.array([PAGE + 3, 2 * PAGE + 100, 5], np.int32)  # slot 1, slot 2, slot 0
    new = tuple(rng.standard_normal((3, HEADS, n), dtype=np.float32) for n in (64, 128))
    new[0][1, 1, 2], new[1][2, 0, 7] = np.nan, 1e9
    device.update(unseals=[(2, 1)], rows=at_cells, new=(new[0], new[1]))
    assert device.nonfinite.get(np.uint64, (1,))[0] == 2
    unpacked = [device.unpack([gpu.SEALED] * 3, is_k)[:, 2 * PAGE :] for is_k in (True, False)]
    for got, before, sealed, x in zip(device.rows(), window, unpacked, new, strict=True):
        want = before.copy()
        want[:, 1] = sealed
        flat = want.reshape(HEADS, 3 * PAGE, -1)
        finite = np.clip(np.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504), -65504, 65504)
        flat[:, at_cells] = finite.transpose(1, 0, 2).astype(np.float16)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("layer", [Layer(Side(4, 128), V), Layer(Side(3, 32, param="log8"), Side(4, 32)),
                                   Layer(Side(0, 64), Side(0, 0, "minmax", "f16", True))], ids=str)  # fmt: skip
@pytest.mark.parametrize("d", [64, 96, 256])
def test_unpacked_pages(layer: Layer, d: int) -> None:
    rng = np.random.default_rng(d)
    window = window_of(rng, d, d, 2)
    device = gpu.DeviceLayer(layer, window, 4)
    valid = np.ones(PAGE, bool)
    device.update([(3, 1, valid)])
    table = [0, gpu.FREE, 1, gpu.SEALED]
    for i, name in enumerate("kv"):
        rows = device.unpack(table, name == "k").reshape(HEADS, 4, PAGE, d)
        np.testing.assert_array_equal(rows[:, [0, 2]], window[i])
        assert (rows[:, 1] == 0).all()
        for head in range(HEADS):
            side = (layer.k, layer.v)[i]
            codes, param, _ = getattr(reference, f"seal_{name}")(side, window[i][head, 1], valid)
            want = getattr(reference, f"dequantize_{name}")(side, d, codes, param).astype(np.float16)
            np.testing.assert_array_equal(rows[head, 3], want)


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(("d", "v"), [(16, V), (128, replace(V, bits=1)), (80, Side(3, 0, "clip", "f16", True)),
                                      (512, Side(4, 0, "lloyd", "log8", True))], ids=str)  # fmt: skip
def test_unpacked_pages_of_all_widths(bits: int, d: int, v: Side) -> None:
    """Tiles of four tokens by eight channels, at the edges of what they cover."""
    rng = np.random.default_rng(d + bits)
    layer = Layer(Side(bits, (32, 64, 128)[bits % 3], param="f16" if bits % 2 == 0 else "log8"), v)
    window = window_of(rng, d, d, 1)
    device = gpu.DeviceLayer(layer, window, 2)
    device.update([(1, 0, np.ones(PAGE, bool))])
    for name in "kv":
        want = exact_rows(device, [0, gpu.SEALED], name).astype(np.float16)
        np.testing.assert_array_equal(device.unpack([0, gpu.SEALED], name == "k"), want)
        np.testing.assert_array_equal(device.unpack([0, gpu.SEALED], name == "k", 1, 1), want[1:])


@pytest.mark.parametrize("k", [Side(4, 128), Side(3, 32, "clip", "log8"), Side(0, 64)], ids=str)
@pytest.mark.parametrize("d", [64, 80])
def test_keys_are_read_and_written_again_for_a_shift(k: Side, d: int) -> None:
    rng = np.random.default_rng(d)
    device = gpu.DeviceLayer(Layer(k, V), window_of(rng, d, 64, 2), 4)
    device.update([(3, 1, np.ones(PAGE, bool)), (2, 0, np.ones(PAGE, bool))])
    pages = [(3, gpu.SEALED), (0, 1)]
    rows = device.unpack([1, gpu.FREE, gpu.SEALED, gpu.SEALED], True).reshape(HEADS, 4, PAGE, d)
    values = [device.block(h, 3)[device.layout.v_codes :].copy() for h in range(HEADS)]
    keys = device.read_keys(pages)
    np.testing.assert_array_equal(keys.transpose(2, 0, 1, 3), rows[:, [3, 0]].astype(np.float32))
    keys, valid = (keys * 1.7 + 0.3).astype(np.float32), valid_tokens(rng, False)
    device.write_keys(pages, keys, valid)
    as_f16 = keys.astype(np.float16)
    np.testing.assert_array_equal(device.rows()[0][:, 1], as_f16[1].transpose(1, 0, 2))
    for head in range(HEADS):
        codes, param, _ = reference.seal_k(k, as_f16[0, :, head], valid)
        block, at = device.block(head, 3), device.layout
        assert k.bits == 0 or block[at.k_codes : at.k_codes + len(codes)].tobytes() == codes
        assert block[at.k_param : at.k_param + len(param)].tobytes() == param
        np.testing.assert_array_equal(block[at.v_codes :], values[head])
        np.testing.assert_array_equal(
            device.unpack([gpu.FREE, gpu.FREE, gpu.SEALED], True).reshape(HEADS, 3, PAGE, d)[:, 2], rows[:, 2]
        )


@dataclass(frozen=True)
class Case:
    k: Side
    v: Side = V
    d: int = 128
    e: int = 0  # 0: d
    n_rep: int = N_REP
    n_tokens: int = 1
    softcap: float = 0.0
    sink: bool = False
    kernel: str = "decode"


CASES = [
    *(Case(Side(bits, 128), replace(V, bits=v), d) for bits in (1, 2, 3, 4) for v in (1, 2) for d in (64, 128)),
    Case(Side(4, 32)),
    Case(Side(4, 64, param="log8"), d=64),
    Case(Side(2, 128, "clip"), replace(V, rotate=False, param="f16")),
    Case(Side(4, 128), n_tokens=5),
    Case(Side(4, 128), n_rep=7, n_tokens=3, d=64),
    Case(Side(4, 128), n_rep=1),
    Case(Side(2, 128), replace(V, bits=1), n_rep=3),
    Case(Side(2, 128), replace(V, bits=1), n_tokens=2),
    Case(Side(4, 128), softcap=20.0, sink=True),
    Case(Side(4, 128), replace(V, bits=4), kernel="general"),
    Case(Side(2, 32, "paper"), Side(1, 32, "paper"), kernel="general"),
    Case(Side(4, 128), d=96, n_tokens=2, softcap=20.0, sink=True, kernel="general"),
    Case(Side(3, 64), d=256, kernel="general"),
    Case(Side(4, 128), d=192, e=128, kernel="general"),
    Case(Side(0, 128), Side(0, 0, "minmax", "f16", True), kernel="general"),
]


def expected(
    q: NDArray[np.float32],
    mask: NDArray[np.float16] | None,
    table: list[int],
    keys: NDArray[np.float32],
    values: NDArray[np.float32],
    case: Case,
    sinks: NDArray[np.float32] | None,
) -> NDArray[np.float64]:
    """keys, values [head][cell][width]."""
    n_rep = q.shape[1] // keys.shape[0]
    out = np.zeros((*q.shape[:2], values.shape[-1]))
    hidden = np.repeat([state == gpu.FREE for state in table], PAGE)
    for h in range(q.shape[1]):
        k, v = keys[h // n_rep].astype(np.float64), values[h // n_rep].astype(np.float64)
        s = q[:, h].astype(np.float64) @ k.T * q.shape[-1] ** -0.5
        s = case.softcap * np.tanh(s / case.softcap) if case.softcap else s
        s = np.where(hidden[None], -np.inf, s if mask is None else s + mask)
        extra = -np.inf if sinks is None else float(sinks[h])
        top = np.maximum(s.max(1, keepdims=True), extra)
        p = np.exp(s - top)
        out[:, h] = p @ v / (p.sum(1, keepdims=True) + np.exp(extra - top))
    return out


def check_attention(
    device: gpu.DeviceLayer,
    q: NDArray[np.float32],
    table: list[int],
    mask: NDArray[np.float16] | None,
    keys: NDArray[np.float32],
    values: NDArray[np.float32],
    case: Case = Case(V),
    sinks: NDArray[np.float32] | None = None,
) -> float:
    ffi, lib = gpu.load()
    kernel = ffi.string(lib.xq_cuda_attend_kernel(device.c)).decode()
    error = 0.0
    want = expected(q, mask, table, keys, values, case, sinks)
    for n_parts in (1, 3, len(table)):
        scale = q.shape[-1] ** -0.5
        got = device.attend(q, table, mask, scale, case.softcap, sinks, min(n_parts, len(table)))
        error = max(error, float(np.abs(got - want).max() / np.abs(want).max()))
    assert error < TOLERANCE[kernel], kernel
    return error


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_that_of_float64(case: Case) -> None:
    rng = np.random.default_rng(7)
    d, e = case.d, case.e or case.d
    table = [0, -1, -1, -2, *[-1] * 15, 2, -1, 1]
    window = window_of(rng, d, e, 3)
    layer = Layer(case.k, case.v)
    device = gpu.DeviceLayer(layer, window, len(table) + 1)
    for page, state in enumerate(table):
        if state == gpu.SEALED:  # every page its own values, by way of slot 0
            fresh = window_of(rng, d, e, 3)
            device.window.set(np.concatenate([x.reshape(-1) for x in fresh]))
            device.update([(page, 0, np.ones(PAGE, bool))])
    # cells that nobody may look at hold poison: what a mask hides, must not matter
    device.window.set(np.concatenate([x.reshape(-1) for x in window]))
    q = (rng.standard_normal((case.n_tokens, HEADS * case.n_rep, d)) * 2).astype(np.float32)
    mask = np.zeros((case.n_tokens, len(table) * PAGE), np.float16)
    mask[rng.random(mask.shape) < 0.3] = -np.inf
    mask[:, PAGE : 2 * PAGE] = -np.inf
    if case.n_tokens > 1:
        mask[0, 4 * PAGE : 9 * PAGE] = -np.inf
    sinks = rng.standard_normal(HEADS * case.n_rep, dtype=np.float32) * 3 if case.sink else None
    keys, values = (exact_rows(device, table, name) for name in "kv")
    ffi, lib = gpu.load()
    assert ffi.string(lib.xq_cuda_attend_kernel(device.c)).decode() == case.kernel
    error = check_attention(device, q, table, mask, keys, values, case, sinks)
    print(f"{case.kernel} error {error:.1e}")


@pytest.mark.parametrize("n_tokens", [1, 2])
@pytest.mark.parametrize("bits", [(4, 2), (2, 1)])
def test_many_pages(bits: tuple[int, int], n_tokens: int) -> None:
    """More than a block has room for: buffers are filled again and again.  Some masks are neither 0 nor -inf."""
    rng = np.random.default_rng(11)
    n_pages, layer = 600, Layer(Side(bits[0], 128), replace(V, bits=bits[1]))
    device = gpu.DeviceLayer(layer, window_of(rng, 64, 64, 3), n_pages)
    device.update([(p, p % 3, np.ones(PAGE, bool)) for p in range(n_pages)])
    table = [gpu.SEALED] * n_pages
    q = rng.standard_normal((n_tokens, HEADS * N_REP, 64), dtype=np.float32)
    mask = np.zeros((n_tokens, n_pages * PAGE), np.float16)
    mask[0, 7 * PAGE : 590 * PAGE] = -np.inf
    mask[:, 3 * PAGE : 5 * PAGE] = rng.standard_normal(2 * PAGE)
    keys, values = (np.tile(exact_rows(device, table[:3], name), (1, n_pages // 3, 1)) for name in "kv")
    check_attention(device, q, table, mask, keys, values)


@pytest.mark.parametrize("v_bits", [1, 2])
@pytest.mark.parametrize("share", [0.5, 0.99])
def test_tokens_beside_a_far_heavier_one_count(v_bits: int, share: float) -> None:
    """One token of 38,400 has as much weight as the others together, or a hundredth; each of those has less than
    a rounding of its weight to 16 bits of the heaviest's can tell from nothing."""
    rng = np.random.default_rng(13)
    n_pages, heavy, d = 300, 150, 128
    layer = Layer(Side(4, 128), replace(V, bits=v_bits))
    window = window_of(rng, d, d, 3)
    window[1][:] += np.float16(1.0)  # what is lost of the others must show
    q = np.repeat(rng.standard_normal((1, HEADS, d), dtype=np.float32), N_REP, 1)
    for head in range(HEADS):
        across = q[0, head * N_REP].astype(np.float64)
        keys = window[0][head].astype(np.float64)
        keys -= (keys @ across)[..., None] * across / (across @ across)  # every score 0 but for the rounding of keys
        keys[2, 64] = across * np.log((n_pages * PAGE) * (1 - share) / share) * d**0.5 / (across @ across)
        window[0][head] = keys.astype(np.float16)
    device = gpu.DeviceLayer(layer, window, n_pages)
    slots = [2 if p == heavy else p % 2 for p in range(n_pages)]
    device.update([(p, slot, np.ones(PAGE, bool)) for p, slot in enumerate(slots)])
    three = [gpu.SEALED, gpu.SEALED, *[gpu.FREE] * (heavy - 2), gpu.SEALED]
    keys, values = (
        exact_rows(device, three, name).reshape(HEADS, -1, PAGE, d)[:, [(0, 1, heavy)[s] for s in slots]]
        for name in "kv"
    )
    table = [gpu.SEALED] * n_pages
    mask = np.zeros((1, n_pages * PAGE), np.float16)
    check_attention(device, q, table, mask, keys.reshape(HEADS, -1, d), values.reshape(HEADS, -1, d))


def test_rows_that_see_nothing_are_zero() -> None:
    rng = np.random.default_rng(3)
    for v in (V, replace(V, bits=4)):
        device = gpu.DeviceLayer(Layer(Side(4, 128), v), window_of(rng, 128, 128, 1), 3)
        device.update([(1, 0, np.ones(PAGE, bool))])
        q = rng.standard_normal((2, HEADS * N_REP, 128), dtype=np.float32)
        mask = np.zeros((2, 3 * PAGE), np.float16)
        mask[0] = -np.inf
        out = device.attend(q, [0, -1, -2], mask, 0.1, n_parts=2)
        assert (out[0] == 0).all()
        assert np.isfinite(out[1]).all()
        assert (out[1] != 0).any()


def test_bad_arguments_are_errors() -> None:
    device = gpu.DeviceLayer(Layer(Side(4, 128), V), window_of(np.random.default_rng(0), 64, 64, 1), 1)
    q = np.zeros((1, HEADS, 64), np.float32)
    with pytest.raises(RuntimeError, match="attend: a pointer is null or a count is out of range"):
        device.attend(q, [-1, -1])
    many = gpu.DeviceLayer(Layer(Side(4, 128), V), window_of(np.random.default_rng(0), 64, 64, 1), 2049)
    with pytest.raises(RuntimeError, match="attend: 2049 pages in 2 parts, must be at most 1024 each"):
        many.attend(q, [-1] * 2049, n_parts=2)
    device.c.d = 60
    with pytest.raises(RuntimeError, match="multiples of 16"):
        device.attend(q, [-1])
