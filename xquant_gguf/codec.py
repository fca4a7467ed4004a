"""The native codec on its own: seal and unseal pages, pack and unpack codes, choose the kernel set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xquant_gguf import native
from xquant_gguf.plan import PAGE, Side, side_to_c


def _check(status: int) -> int:
    if status < 0:
        raise ValueError(native.error())
    return status


def kernel_sets() -> tuple[str, ...]:
    """Kernel sets that this CPU and operating system can run, best first."""
    ffi, lib = native.load()
    names: str = ffi.string(lib.xq_kernels_available()).decode()
    return tuple(names.split(","))


def kernels() -> str:
    """The kernel set in force; ValueError if XQUANT_KERNELS names one that cannot run."""
    ffi, lib = native.load()
    name = lib.xq_kernels()
    if name == ffi.NULL:
        raise ValueError(native.error())
    return str(ffi.string(name).decode())


def kernel_calls(name: str) -> int:
    """How often kernels of a set were called in this process."""
    _, lib = native.load()
    return int(lib.xq_kernels_calls(name.encode()))


@contextmanager
def force_kernels(name: str) -> Iterator[None]:
    """Runs the body with the named kernel set; ValueError if it cannot run here."""
    _, lib = native.load()
    before = kernels()
    _check(lib.xq_kernels_force(name.encode()))
    try:
        yield
    finally:
        _check(lib.xq_kernels_force(before.encode()))


def pack(codes: ArrayLike, bits: int) -> bytes:
    """Codes [n_i][n_j] (multiples of 16) below 2^bits as bytes, in the order of native/include/xquant.h."""
    ffi, lib = native.load()
    c = np.ascontiguousarray(codes, np.uint8)
    if c.ndim != 2:
        raise ValueError(f"codes have shape {c.shape}, must have two dimensions")
    size = _check(lib.xq_packed_bytes(bits, *c.shape))
    out = ffi.new("uint8_t[]", size)
    _check(lib.xq_pack(bits, *c.shape, ffi.from_buffer("uint8_t[]", c), out))
    return bytes(ffi.buffer(out, size))


def unpack(packed: bytes, bits: int, n_i: int, n_j: int) -> NDArray[np.uint8]:
    """The way back: codes [n_i][n_j]."""
    ffi, lib = native.load()
    size = _check(lib.xq_packed_bytes(bits, n_i, n_j))
    if len(packed) != size:
        raise ValueError(f"packed has {len(packed)} bytes, must have {size} for {bits} bits, {n_i} by {n_j}")
    out = np.empty((n_i, n_j), np.uint8)
    _check(lib.xq_unpack(bits, n_i, n_j, ffi.from_buffer("uint8_t[]", packed), ffi.from_buffer("uint8_t[]", out)))
    return out


def hadamard(x: ArrayLike) -> NDArray[np.float32]:
    """Rows of x [rows][n] times the normalised Hadamard matrix, in blocks of the largest power of two dividing n."""
    ffi, lib = native.load()
    y = np.array(x, np.float32, order="C")
    if y.ndim != 2:
        raise ValueError(f"x has shape {y.shape}, must have two dimensions")
    _check(lib.xq_hadamard(ffi.from_buffer("float[]", y), *y.shape))
    return y


def _part_sizes(side: Side, width: int, is_k: bool) -> tuple[int, int]:
    """Bytes of the codes and of the parameters of one side of a block, without padding."""
    _ffi, lib = native.load()
    length, n = (PAGE, width) if is_k else (width, PAGE)
    group = length if side.group == 0 or side.group > length else side.group
    param = length // max(group, 1) * n * (2 if side.bits == 0 or side.param == "log8" else 4)
    codes = _check(lib.xq_packed_bytes(side.bits, width if is_k else PAGE, length)) if side.bits > 0 else 0
    return codes, param


def _predicted(e: int, predicted: NDArray[np.float32] | None) -> Any:
    """What predict_v gave, as a C pointer."""
    ffi, _ = native.load()
    if predicted is None:
        return ffi.NULL
    if predicted.shape != (e, PAGE) or predicted.dtype != np.float32:
        raise ValueError(f"predicted is {predicted.dtype} {predicted.shape}, must be float32 ({e}, {PAGE})")
    return ffi.from_buffer("float[]", np.ascontiguousarray(predicted))


def _seal(
    name: str, side: Side, rows: ArrayLike, valid: ArrayLike | None, owner: bytes | None, *more: Any
) -> tuple[bytes, bytes]:
    ffi, lib = native.load()
    x = np.ascontiguousarray(rows, np.float16)
    if x.ndim != 2 or len(x) != PAGE:
        raise ValueError(f"rows have shape {x.shape}, must be ({PAGE}, head width)")
    flags = np.ones(PAGE, bool) if valid is None else np.asarray(valid, bool)
    if flags.shape != (PAGE,):
        raise ValueError(f"valid has shape {flags.shape}, must be ({PAGE},)")
    if (owner is None) != (side.owner < 0):
        raise ValueError("owner_codes must be given exactly if side.owner >= 0")
    c = ffi.new("xq_side *")
    side_to_c(c, side, "side")
    _check(lib.xq_check_side(c, int(name == "k"), x.shape[1]))
    n_codes, n_param = _part_sizes(side, x.shape[1], name == "k")
    if owner is not None and len(owner) != n_codes:
        raise ValueError(f"owner_codes have {len(owner)} bytes, must have {n_codes}")
    codes, param = ffi.new("uint8_t[]", max(n_codes, 1)), ffi.new("uint8_t[]", n_param)
    words = np.packbits(flags, bitorder="little").view(np.uint32)
    bad = _check(
        getattr(lib, f"xq_seal_{name}")(
            c, x.shape[1], ffi.from_buffer("uint16_t[]", x), x.shape[1], ffi.from_buffer("uint32_t[]", words),
            ffi.NULL if owner is not None else codes, param,
            ffi.NULL if owner is None else ffi.from_buffer("uint8_t[]", owner), side.bits, *more,
        )
    )  # fmt: skip
    if bad:
        raise ValueError(f"rows hold {bad} numbers that are not finite")
    return b"" if owner is not None else bytes(ffi.buffer(codes, n_codes)), bytes(ffi.buffer(param, n_param))


def _unseal(name: str, side: Side, width: int, codes: bytes, param: bytes, *more: Any) -> NDArray[np.float16]:
    ffi, lib = native.load()
    c = ffi.new("xq_side *")
    side_to_c(c, side, "side")
    _check(lib.xq_check_side(c, int(name == "k"), width))
    sizes = _part_sizes(side, width, name == "k")
    if (len(codes), len(param)) != sizes:
        raise ValueError(
            f"codes and param have {len(codes)} and {len(param)} bytes, must have {sizes[0]} and {sizes[1]}"
        )
    out = np.empty((PAGE, width), np.float16)
    buffers = [ffi.from_buffer("uint8_t[]", part) for part in (codes, param)]
    call = getattr(lib, f"xq_unseal_{name}")
    _check(call(c, width, buffers[0], side.bits, buffers[1], ffi.from_buffer("uint16_t[]", out), width, *more))
    return out


def seal_k(
    side: Side, rows: ArrayLike, valid: ArrayLike | None = None, owner_codes: bytes | None = None
) -> tuple[bytes, bytes]:
    """Codes and parameters of one page of keys of one KV head, rows [128][d] in F16.

    valid [128]: tokens that count (default all). owner_codes: codes of the layer that side.owner names; the codes
    returned are then empty. ValueError names what is out of range, and inputs that are not finite.
    """
    return _seal("k", side, rows, valid, owner_codes)


def seal_v(
    side: Side,
    rows: ArrayLike,
    valid: ArrayLike | None = None,
    owner_codes: bytes | None = None,
    predicted: NDArray[np.float32] | None = None,
) -> tuple[bytes, bytes]:
    """As seal_k, for values [128][e].  predicted [e][128]: what a map says they are; the remainder is stored."""
    return _seal("v", side, rows, valid, owner_codes, _predicted(np.shape(rows)[-1], predicted))


def predict_v(source: Side, e: int, codes: bytes, param: bytes, weight: ArrayLike) -> NDArray[np.float32]:
    """Values [e][128] that a map, weight [e of the source][e], makes of a sealed page of its source."""
    ffi, lib = native.load()
    w = np.ascontiguousarray(weight, np.float32)
    if w.shape != (e, e):
        raise ValueError(f"weight has shape {w.shape}, must be ({e}, {e})")
    c = ffi.new("xq_side *")
    side_to_c(c, source, "source")
    _check(lib.xq_check_side(c, 0, e))
    if (len(codes), len(param)) != (sizes := _part_sizes(source, e, False)):
        raise ValueError(f"codes and param have {len(codes)} and {len(param)} bytes, must have {sizes}")
    out = np.empty((e, PAGE), np.float32)
    buffers = [ffi.from_buffer("uint8_t[]", part) for part in (codes, param)]
    _check(lib.xq_predict_v(c, e, *buffers, ffi.from_buffer("float[]", w), ffi.from_buffer("float[]", out)))
    return out


def unseal_k(side: Side, d: int, codes: bytes, param: bytes) -> NDArray[np.float16]:
    """Keys [128][d] of a sealed page; codes: its own or the owner's."""
    return _unseal("k", side, d, codes, param)


def unseal_v(
    side: Side, e: int, codes: bytes, param: bytes, predicted: NDArray[np.float32] | None = None
) -> NDArray[np.float16]:
    """Values [128][e] of a sealed page, rotated back if they are stored rotated."""
    return _unseal("v", side, e, codes, param, _predicted(e, predicted))
