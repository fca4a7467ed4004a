"""The codec in numpy: the executable specification that every native kernel set matches byte for byte.

A group of values x becomes B-bit codes and two numbers (arXiv 2510.11236, section 3):

    x^ = base + scale * (code - middle)      code = round((x - base) / scale + middle), within 0 .. 2^B - 1

"f16" parameters store scale and zero (base = zero, middle = 0) as F16; "log8" stores scale = 2^((e - 161) / 8) with
e in 1 .. 255 and centre = q * scale / 8 with q in -127 .. 127 (base = centre, middle = (2^B - 1) / 2).

Arrays are x [n_j elements of all groups][n_i lanes]: one group a lane.  Keys: j = token of the page, i = channel.
Values: j = channel of the head, i = token.  All arithmetic is single precision in the order written here: sums run over
j, roundings are half to even, nothing is contracted.

What follows for special input: a constant group gives scale 0, code 0 and its value exactly with "f16" (with "log8"
the value to within scale / 2, where scale is at least the value / 15); not-a-numbers count as 0 and infinities, like
everything beyond F16, as +-65504.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xquant_gguf.plan import PAGE, Side

F32 = np.float32
Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]

LOG8_ZERO = 161
STEPS = np.array([2 ** (j / 8) for j in range(8)]).astype(F32)
# mantissa bits of 2^((j + 1/2) / 8): where one step of the logarithmic scale rounds to the next
THRESHOLDS = np.array([2 ** ((j + 0.5) / 8) for j in range(8)]).astype(F32).view(np.uint32) & 0x7FFFFF
LONGER_LLOYD, LONGER_CLIP = F32(1.25), F32(0.6)
CLIP_ONE_BIT = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35)
CLIP_MORE_BITS = (0.0, 0.04, 0.08, 0.12, 0.16, 0.2)


@dataclass
class Parameters:
    """Scale and base of each lane, and, for log8, what is stored for them."""

    scale: Floats
    base: Floats
    middle: np.float32 = F32(0)
    e: NDArray[np.int32] | None = None
    q: NDArray[np.int32] | None = None


# ---- packing: the unit order of native/include/xquant.h ----


def pack(codes: Codes, bits: int) -> bytes:
    """Codes [n_i][n_j] (both multiples of 16) as bytes: [j / 16][unit of i][64], 3 bits as a 2-bit and a 1-bit part."""
    if bits == 3:
        low = np.frombuffer(pack((codes & 3).astype(np.uint8), 2), np.uint8).reshape(codes.shape[1] // 16, -1)
        high = np.frombuffer(pack((codes >> 2).astype(np.uint8), 1), np.uint8).reshape(codes.shape[1] // 16, -1)
        return np.concatenate([low, high], axis=1).tobytes()
    n_i, n_j = codes.shape
    rows = 32 // bits  # of a unit
    padded = np.zeros((-(-n_i // rows) * rows, n_j), np.uint8)
    padded[:n_i] = codes
    # i = (unit, plane, i % 4), j = (block, j % 16); byte 4 (j % 16) + i % 4 of a unit holds all planes
    parts = padded.reshape(-1, 8 // bits, 4, n_j // 16, 16).transpose(3, 0, 4, 2, 1)
    shifts = (bits * np.arange(8 // bits)).astype(np.uint8)
    return np.bitwise_or.reduce(parts << shifts, axis=-1).astype(np.uint8).tobytes()


def unpack(packed: bytes, bits: int, n_i: int, n_j: int) -> Codes:
    """The way back: codes [n_i][n_j]."""
    if bits == 3:
        blocks = np.frombuffer(packed, np.uint8).reshape(n_j // 16, -1)
        cut = 64 * (-(-n_i // 16))
        low, high = blocks[:, :cut].tobytes(), blocks[:, cut:].tobytes()
        return (unpack(low, 2, n_i, n_j) | unpack(high, 1, n_i, n_j) << 2).astype(np.uint8)
    units = np.frombuffer(packed, np.uint8).reshape(n_j // 16, -1, 16, 4)
    shifts = (bits * np.arange(8 // bits)).astype(np.uint8)
    planes = units[..., None] >> shifts & (2**bits - 1)  # [block][unit][j % 16][i % 4][plane]
    return planes.transpose(1, 4, 3, 0, 2).reshape(-1, n_j)[:n_i].astype(np.uint8)


# ---- parameters ----


def _half(x: Floats) -> Floats:
    return np.clip(x, F32(-65504), F32(65504)).astype(np.float16).astype(F32)


def _clamped(x: Floats) -> Floats:
    return np.clip(np.where(np.isnan(x), F32(0), x), F32(-65504), F32(65504))


def log8_scale(e: NDArray[np.int32]) -> Floats:
    """2^((e - 161) / 8)."""
    k = e - LOG8_ZERO
    return np.ldexp(STEPS[k & 7], k >> 3).astype(F32)


def round_parameters(scale: Floats, zero: Floats, bits: int, param: str) -> Parameters:
    """Scale and zero as they are stored. log8: the scale grows until the centre fits into q."""
    if param == "f16":
        return Parameters(_half(scale), _half(zero))
    middle = F32((2**bits - 1) * 0.5)
    centre = zero + scale * middle
    scale = np.maximum(scale, np.abs(centre) * (F32(8) / F32(120)))
    raw = scale.view(np.uint32)
    e = ((raw >> 23).astype(np.int32) - 127) * 8 + LOG8_ZERO
    e += ((raw & 0x7FFFFF)[:, None] >= THRESHOLDS).sum(axis=1, dtype=np.int32)
    e = np.clip(e, 1, 255)
    scale = log8_scale(e)
    unit = scale * F32(0.125)
    q = np.rint(np.clip(centre * (F32(1) / unit), F32(-127), F32(127)))
    return Parameters(scale, q * unit, middle, e, q.astype(np.int32))


def _param_bytes(p: Parameters, bits: int, param: str) -> bytes:
    if bits == 0:
        return p.base.astype(np.float16).tobytes()
    if param == "f16":
        return p.scale.astype(np.float16).tobytes() + p.base.astype(np.float16).tobytes()
    assert p.e is not None
    assert p.q is not None
    return p.e.astype(np.uint8).tobytes() + p.q.astype(np.int8).tobytes()


def _load_parameters(data: bytes, n: int, bits: int, param: str) -> Parameters:
    if bits == 0:
        return Parameters(np.zeros(n, F32), np.frombuffer(data, np.float16, n).astype(F32))
    if param == "f16":
        scale, zero = np.frombuffer(data, np.float16, 2 * n).astype(F32).reshape(2, n)
        return Parameters(scale, zero)
    e = np.frombuffer(data, np.uint8, n).astype(np.int32)
    q = np.frombuffer(data, np.int8, n, offset=n).astype(F32)
    scale = log8_scale(e)
    return Parameters(scale, q * (scale * F32(0.125)), F32((2**bits - 1) * 0.5))


# ---- fits ----


def _range(x: Floats) -> tuple[Floats, Floats]:
    low = high = x[0]
    for row in x[1:]:
        low, high = np.where(row < low, row, low), np.where(row > high, row, high)
    return low, high


def _relaxed(x: Floats, bits: int, eta: float) -> tuple[Floats, Floats]:
    """Scale and zero of the range, shrunk by eta at both ends (paper, section 3.2)."""
    low, high = _range(x)
    r = high - low
    return r / F32(2**bits - 1) * (F32(1) - F32(2) * F32(eta)), low + r * F32(eta)


def encode(x: Floats, p: Parameters, bits: int) -> Floats:
    """Codes of x [n][lanes], as floats; a lane of scale 0 has code 0."""
    inverse = np.where(p.scale != 0, F32(1) / np.where(p.scale != 0, p.scale, F32(1)), F32(0))
    return np.rint(np.clip((x - p.base) * inverse + p.middle, F32(0), F32(2**bits - 1)))


def _least_squares(x: Floats, codes: Floats, flat: tuple[Floats, Floats]) -> tuple[Floats, Floats, Floats]:
    """Scale and zero that fit given codes best, and the share of the variance that is left over; lanes whose codes are
    all the same get `flat`."""
    low, high = _range(x)
    shift = (low + high) * F32(0.5)
    sum_c = sum_cc = sum_x = sum_xc = sum_xx = np.zeros_like(x[0])
    for row, c in zip(x, codes, strict=True):
        y = row - shift
        sum_c, sum_cc, sum_x, sum_xc = sum_c + c, sum_cc + c * c, sum_x + y, sum_xc + y * c
        sum_xx = sum_xx + y * y
    mean_c, mean_x = sum_c / F32(len(x)), sum_x / F32(len(x))
    variance, both, whole = sum_cc - sum_c * mean_c, sum_xc - sum_x * mean_c, sum_xx - sum_x * mean_x
    usable, varies = variance > F32(0.25), whole > F32(0)
    scale = both / np.where(usable, variance, F32(1))
    rest = F32(1) - scale * both / np.where(varies, whole, F32(1))
    rest = np.where(varies, np.clip(rest, F32(0), F32(1)), F32(0))
    zero = shift + mean_x - scale * mean_c
    return np.where(usable, scale, flat[0]), np.where(usable, zero, flat[1]), rest


def _lengthened(scale: Floats, zero: Floats, rest: Floats, much: np.float32, bits: int) -> tuple[Floats, Floats]:
    """Scale and zero of a fit of least error, which is short: values nearer to their centre than they were.

    Errors of that kind do not cancel in sums over tokens, as others do, so the scale grows again, by `much` times the
    share of the variance that is left over; codes that are sealed again stay as they are.
    """
    longer = scale * (rest * much + F32(1))
    return longer, zero + (scale - longer) * (F32(2**bits - 1) * F32(0.5))


def _mean(x: Floats) -> Floats:
    low, high = _range(x)
    shift = (low + high) * F32(0.5)
    total = np.zeros_like(x[0])
    for row in x:
        total = total + (row - shift)
    return shift + total / F32(len(x))


def _fit_clip(x: Floats, bits: int, param: str) -> Parameters:
    """The shrink ratio of least squared error, per lane; the first of equals; lengthened."""
    best = Parameters(np.zeros_like(x[0]), np.zeros_like(x[0]))
    raw = best.scale, best.base
    best_error = np.full_like(x[0], np.inf)
    for eta in CLIP_ONE_BIT if bits == 1 else CLIP_MORE_BITS:
        fit = _relaxed(x, bits, eta)
        p = round_parameters(*fit, bits, param)
        error = np.zeros_like(x[0])
        for row, c in zip(x, encode(x, p, bits), strict=True):
            off = p.base + p.scale * (c - p.middle) - row
            error = error + off * off
        better = error < best_error
        best_error = np.where(better, error, best_error)
        scale, base = np.where(better, p.scale, best.scale), np.where(better, p.base, best.base)
        best = Parameters(scale, base, p.middle)
        raw = np.where(better, fit[0], raw[0]), np.where(better, fit[1], raw[1])
    rest = _least_squares(x, encode(x, best, bits), raw)[2]
    return round_parameters(*_lengthened(*raw, rest, LONGER_CLIP, bits), bits, param)


def quantize(x: Floats, side: Side, owner_codes: Codes | None = None) -> tuple[Codes, Parameters]:
    """One group a lane: codes [n][lanes] and parameters of x [n][lanes]; owner_codes: borrowed ones, kept."""
    bits, param = side.bits, side.param
    if bits == 0:
        return np.zeros(x.shape, np.uint8), Parameters(np.zeros_like(x[0]), _half(_mean(x)))
    if side.fit == "lsq":
        assert owner_codes is not None
        flat = (np.zeros_like(x[0]), _mean(x))
        return owner_codes, round_parameters(*_least_squares(x, owner_codes.astype(F32), flat)[:2], bits, param)
    if side.fit == "clip":
        p = _fit_clip(x, bits, param)
    elif side.fit == "lloyd":
        fit, rest = _relaxed(x, bits, side.eta), np.zeros_like(x[0])
        for _ in range(3):
            scale, zero, rest = _least_squares(x, encode(x, Parameters(*fit), bits), fit)
            fit = scale, zero
        p = round_parameters(*_lengthened(*fit, rest, LONGER_LLOYD, bits), bits, param)
    else:
        p = round_parameters(*_relaxed(x, bits, side.eta), bits, param)
    if owner_codes is not None:
        return owner_codes, p
    # the paper's codes belong to the full range, before it was relaxed and rounded
    grid = Parameters(*_relaxed(x, bits, 0.0)) if side.fit == "paper" else p
    return encode(x, grid, bits).astype(np.uint8), p


# ---- pages ----


def hadamard(x: Floats) -> Floats:
    """x [n][lanes] times the normalised Hadamard matrix along n, in blocks of the largest power of two dividing n."""
    n = len(x)
    block = n & -n
    x = x.copy()
    h = 1
    while h < block:
        y = x.reshape(n // (2 * h), 2, h, -1)
        x = np.stack([y[:, 0] + y[:, 1], y[:, 0] - y[:, 1]], axis=1).reshape(x.shape)
        h *= 2
    return x * F32(1 / np.sqrt(np.float64(block)))


def _finite(rows: NDArray[np.float16], valid: NDArray[np.bool_]) -> tuple[Floats, int]:
    """F32 rows [PAGE][width], invalid tokens replaced by the first valid one, and the number of non-finite inputs."""
    first = int(valid.argmax()) if valid.any() else PAGE - 1
    x = rows[np.where(valid, np.arange(PAGE), first)].astype(F32)
    bad = ~(np.abs(x) <= F32(65504))
    return _clamped(x), int(bad.sum())


def _seal(side: Side, x: Floats, group: int, owner: bytes | None) -> tuple[bytes, bytes]:
    n_j, n_i = x.shape
    owned = None if owner is None or side.bits == 0 else unpack(owner, side.bits, n_i, n_j).T
    codes = np.zeros((n_j, n_i), np.uint8)
    parameters = b""
    for j in range(0, n_j, group):
        borrowed = None if owned is None else owned[j : j + group]
        codes[j : j + group], p = quantize(x[j : j + group], side, borrowed)
        parameters += _param_bytes(p, side.bits, side.param)
    return (pack(codes.T, side.bits) if side.bits > 0 and owned is None else b""), parameters


def _dequantize(side: Side, n_j: int, n_i: int, group: int, codes: bytes, parameters: bytes) -> Floats:
    c = unpack(codes, side.bits, n_i, n_j).T.astype(F32) if side.bits > 0 else np.zeros((n_j, n_i), F32)
    size = len(parameters) // (n_j // group)
    x = np.empty((n_j, n_i), F32)
    for g, j in enumerate(range(0, n_j, group)):
        p = _load_parameters(parameters[g * size : (g + 1) * size], n_i, side.bits, side.param)
        x[j : j + group] = p.base if side.bits == 0 else p.base + p.scale * (c[j : j + group] - p.middle)
    return x


def _value_group(side: Side, e: int) -> int:
    return e if side.group == 0 or side.group > e else side.group


Seal = Callable[[Side, NDArray[np.float16], NDArray[np.bool_], bytes | None], tuple[bytes, bytes, int]]


def seal_k(
    side: Side, rows: NDArray[np.float16], valid: NDArray[np.bool_], owner_codes: bytes | None = None
) -> tuple[bytes, bytes, int]:
    """Codes and parameters of the keys of one page and KV head, rows [PAGE][d], and how many inputs were not finite.

    valid [PAGE]: tokens that count. owner_codes: codes to borrow; the codes returned are then empty.
    """
    x, bad = _finite(rows, valid)
    return *_seal(side, x, side.group, owner_codes), bad


def seal_v(
    side: Side,
    rows: NDArray[np.float16],
    valid: NDArray[np.bool_],
    owner_codes: bytes | None = None,
    predicted: Floats | None = None,
) -> tuple[bytes, bytes, int]:
    """As seal_k, for values [PAGE][e]; rotated first if the side says so.  predicted [e][PAGE]: of predict_v."""
    x, bad = _finite(rows, valid)
    y = np.ascontiguousarray(x.T)
    y = hadamard(y) if side.rotate else y
    y = y if predicted is None else y - predicted
    return *_seal(side, y, _value_group(side, rows.shape[1]), owner_codes), bad


def predict_v(source: Side, e: int, codes: bytes, parameters: bytes, weight: Floats) -> Floats:
    """Values [e][PAGE], in the space they are stored in, that a map [e][e] makes of a sealed page of its source."""
    stored = _dequantize(source, e, PAGE, _value_group(source, e), codes, parameters)
    total = np.zeros((e, PAGE), F32)
    for row, w in zip(stored, weight, strict=True):
        total = total + row[None, :] * w[:, None]
    return _clamped(total)


# ---- pages in bytes ----


def _shrink(x: Floats) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Bytes [n_j][lanes] and parameters [2][lanes], scales and centres, of one group a lane."""
    low, high = _range(x)
    centre = _half((low + high) * F32(0.5))
    reach = np.maximum(high - centre, centre - low)
    # half a step of F16 more, whether it is a normal number or not: rounded up
    scale = _half(reach * (F32(1) / F32(127)) * F32(1 + 2**-11) + F32(2**-25))
    inverse = np.where(scale != 0, F32(1) / np.where(scale != 0, scale, F32(1)), F32(0))
    codes = np.rint(np.clip((x - centre) * inverse, F32(-127), F32(127)))
    return codes.astype(np.int8), np.stack([scale, centre]).astype(np.float16)


def shrink(
    rows: NDArray[np.float16], valid: NDArray[np.bool_], is_k: bool
) -> tuple[NDArray[np.int8], NDArray[np.float16], int]:
    """F16 rows [PAGE][width] as bytes [PAGE][width] with their parameters, and how many inputs were not finite.

    x^ = centre + scale * byte; parameters [2][n], scales and centres: n = width channels of keys, or PAGE tokens.
    """
    x, bad = _finite(rows, valid)
    codes, param = _shrink(x if is_k else np.ascontiguousarray(x.T))
    return (codes if is_k else np.ascontiguousarray(codes.T)), param, bad


def widen(codes: NDArray[np.int8], param: NDArray[np.float16], is_k: bool) -> Floats:
    """Rows [PAGE][width] of a page in bytes, not rounded to F16."""
    scale, centre = param.astype(F32)[(slice(None), None) if is_k else (slice(None), slice(None), None)]
    return centre + scale * codes.astype(F32)


def dequantize_k(side: Side, d: int, codes: bytes, parameters: bytes) -> Floats:
    """Keys [PAGE][d] of a sealed page; codes: its own or the owner's."""
    return _dequantize(side, PAGE, d, side.group, codes, parameters)


def dequantize_v(side: Side, e: int, codes: bytes, parameters: bytes, predicted: Floats | None = None) -> Floats:
    """Values [PAGE][e] of a sealed page, rotated back if they are stored rotated."""
    x = _dequantize(side, e, PAGE, _value_group(side, e), codes, parameters)
    x = x if predicted is None else x + predicted
    return np.ascontiguousarray((hadamard(x) if side.rotate else x).T)
