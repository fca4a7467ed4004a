"""Attention over pages of random codes: the cases, their float64 result, and calls of the native kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from xquant_gguf import native, reference
from xquant_gguf.plan import PAGE, Side, side_to_c

# Largest error of an output in units of the largest output.  The exact set is single precision; the others round the
# vectors that are multiplied with codes to 8 bits.  Measured over these cases: 1.0e-6 and 1.9e-3.
TOLERANCE = {"scalar": 3e-6} | dict.fromkeys(("avx2", "avx512", "neon", "neon-dotprod", "neon-i8mm"), 4e-3)

Array = NDArray[np.float64]


@dataclass
class Case:
    """One KV head: n_pages pages, the sealed ones random codes with random parameters."""

    d: int = 64
    e: int = 64
    k: Side = Side(4, 128)
    v: Side = Side(2, 0, "lloyd", "log8", True)
    states: Sequence[int] = (0, -1, -1, -2, -1, 1)  # page_slot
    n_rows: int = 3
    softcap: float = 0.0
    slope: float = 1.0
    sink: float = -np.inf
    masked: bool = True
    seed: int = 0
    source: Side | None = None  # V is what a random map of such values leaves over


def parameters(rng: np.random.Generator, side: Side, n: int, groups: int) -> list[bytes]:
    """Random parameters of one side of a page, group by group: scales near 0.1, zeros a few scales away."""
    out = []
    for _ in range(groups):
        scale, zero = (0.05 + 0.1 * rng.random(n)).astype(np.float32), rng.standard_normal(n).astype(np.float32)
        if side.owner >= 0:
            scale *= rng.choice((-1, 1), n)  # least-squares scales may be negative
        p = reference.round_parameters(scale, zero * 0.3, max(side.bits, 1), side.param)
        out.append(reference._param_bytes(p, side.bits, side.param))
    return out


class Head:
    """The arrays of a case: what the kernel reads, and the same keys and values as float64."""

    def __init__(self, case: Case) -> None:
        rng = np.random.default_rng(case.seed)
        n_pages, n_slots = len(case.states), max(max(case.states), 0) + 1
        self.windows = [rng.standard_normal((n_slots, PAGE, n)).astype(np.float16) for n in (case.d, case.e)]
        self.codes, self.params, self.read = [], [], []
        sides = (("k", case.k, case.d, PAGE), ("v", case.v, PAGE, case.e))
        for (name, side, n_i, n_j), window in zip(sides, self.windows, strict=True):
            group = n_j if side.group == 0 or side.group > n_j else side.group
            pages_codes, pages_param, values = [], [], np.zeros((n_pages, PAGE, n_i if name == "k" else n_j))
            for p, state in enumerate(case.states):
                codes = rng.integers(0, 2**side.bits, (n_i, n_j), dtype=np.uint8)
                packed = reference.pack(codes, side.bits) if side.bits > 0 else bytes(64)
                param = b"".join(parameters(rng, side, n_i, n_j // group))
                pages_codes.append(packed)
                pages_param.append(param)
                dequantize = getattr(reference, f"dequantize_{name}")
                plain = dequantize(side, n_i if name == "k" else n_j, packed, param)
                values[p] = window[state] if state >= 0 else plain
            self.codes.append(np.frombuffer(b"".join(pages_codes), np.uint8).reshape(n_pages, -1))
            self.params.append(np.frombuffer(b"".join(pages_param), np.uint8).reshape(n_pages, -1))
            self.read.append(values.reshape(n_pages * PAGE, -1))
        if case.source is not None:
            self.map_values(case, rng)
        self.q = (rng.standard_normal((case.n_rows, case.d)) * 1.5).astype(np.float32)
        mask = np.zeros((case.n_rows, n_pages * PAGE), np.float16)
        if case.masked:
            mask[rng.random(mask.shape) < 0.3] = -np.inf
            mask[:, PAGE : PAGE + 40] = -np.inf
            mask[0, 2 * PAGE : 3 * PAGE] = -np.inf  # a page that one row does not see
            if case.slope != 1.0:
                mask[mask == 0] = -np.arange((mask == 0).sum()) % 7
        self.mask = mask
        hidden = np.repeat([state == -2 for state in case.states], PAGE)
        self.hidden = (mask == -np.inf) | hidden[None, :]

    def map_values(self, case: Case, rng: np.random.Generator) -> None:
        """Gives the sealed pages a source, and a map of its values."""
        assert case.source is not None
        e = case.e
        self.weight = (rng.standard_normal((e, e)) / e**0.5).astype(np.float32)
        values = self.read[1].reshape(-1, PAGE, e)
        codes, params = [], []
        for p, state in enumerate(case.states):
            rows = rng.standard_normal((PAGE, e)).astype(np.float16)
            packed, param, _ = reference.seal_v(case.source, rows, np.ones(PAGE, bool))
            codes.append(packed or bytes(64))
            params.append(param)
            if state < 0:
                predicted = reference.predict_v(case.source, e, packed, param, self.weight)
                own = self.codes[1][p].tobytes(), self.params[1][p].tobytes()
                values[p] = reference.dequantize_v(case.v, e, *own, predicted)
        self.source = [np.frombuffer(b"".join(x), np.uint8).reshape(len(x), -1) for x in (codes, params)]


def expected(case: Case, head: Head) -> Array:
    """softmax(...) v in float64 [row][e]."""
    keys, values = head.read
    scores = head.q.astype(np.float64) @ keys.T / np.sqrt(case.d)
    if case.softcap > 0:
        scores = case.softcap * np.tanh(scores / case.softcap)
    scores = np.where(head.hidden, -np.inf, scores + case.slope * np.where(head.hidden, 0, head.mask))
    top = np.maximum(scores.max(1, keepdims=True), case.sink)
    top = np.where(np.isfinite(top), top, 0)
    p = np.exp(scores - top)
    total = p.sum(1, keepdims=True) + np.exp(case.sink - top)
    return (p @ values) / np.where(total > 0, total, 1)


def attend(case: Case, head: Head, parts: Sequence[int]) -> NDArray[np.float32]:
    """The native result [row][e]; parts: page numbers where the range is cut."""
    ffi, lib = native.load()
    keep = []

    def pointer(ctype: str, array: np.ndarray) -> object:
        keep.append(array)
        return ffi.from_buffer(ctype, array)

    a = ffi.new("xq_attention *")
    a.d, a.e, a.n_rows = case.d, case.e, case.n_rows
    side_to_c(a.k, case.k, "k")
    side_to_c(a.v, case.v, "v")
    a.k_code_bits, a.v_code_bits = case.k.bits, case.v.bits
    a.k_codes, a.v_codes = (pointer("uint8_t[]", c) for c in head.codes)
    a.k_param, a.v_param = (pointer("uint8_t[]", c) for c in head.params)
    a.k_codes_stride, a.v_codes_stride = (c.strides[0] for c in head.codes)
    a.k_param_stride, a.v_param_stride = (c.strides[0] for c in head.params)
    a.k_window, a.v_window = (pointer("uint16_t[]", w) for w in head.windows)
    a.page_slot = pointer("int32_t[]", np.array(case.states, np.int32))
    weight = ffi.NULL
    if case.source is not None:
        a.mapped = 1
        side_to_c(a.source, case.source, "source")
        a.source_codes, a.source_param = (pointer("uint8_t[]", x) for x in head.source)
        a.source_codes_stride, a.source_param_stride = (x.strides[0] for x in head.source)
        weight = pointer("float[]", head.weight)
    q = [pointer("float[]", row) for row in head.q]
    mask = [pointer("uint16_t[]", row) for row in head.mask]
    q_rows, mask_rows = ffi.new("const float *[]", q), ffi.new("const uint16_t *[]", mask)
    a.q, a.mask = q_rows, mask_rows
    a.slope = pointer("float[]", np.full(case.n_rows, case.slope, np.float32))
    a.scale, a.softcap = 1 / np.sqrt(case.d), case.softcap

    edges = [0, *parts, len(case.states)]
    states = np.full((len(edges) - 1, case.n_rows, (2 if case.source is None else 3) * case.e + 2), np.nan, np.float32)
    for i in range(len(edges) - 1):
        a.page_begin, a.page_end = edges[i], edges[i + 1]
        rows = [ffi.from_buffer("float[]", row) for row in states[i]]
        partial = ffi.new("float *[]", rows)
        a.partial = partial
        assert lib.xq_attend(a) == 0, native.error()
    out = np.full((case.n_rows, case.e), np.nan, np.float32)
    for row in range(case.n_rows):
        rows = [ffi.from_buffer("float[]", states[i, row]) for i in range(len(states))]
        merged = ffi.new("const float *[]", rows)
        result = ffi.from_buffer("float[]", out[row])
        assert lib.xq_attention_merge(len(rows), merged, case.e, int(case.v.rotate), case.sink, weight, result) == 0
    return out


V = Side(2, 0, "lloyd", "log8", True)
CASES = {
    "default": Case(),
    "k3 v2": Case(k=Side(3, 128)),
    "k2 v1": Case(k=Side(2, 128), v=replace(V, bits=1)),
    "k1 v3": Case(k=Side(1, 128), v=replace(V, bits=3)),
    "k4 v4": Case(v=replace(V, bits=4)),
    "paper": Case(k=Side(2, 32, "paper"), v=Side(2, 32, "paper")),
    "means": Case(k=Side(0, 64), v=Side(0, 0)),
    "borrowed": Case(k=Side(2, 64, "lsq", owner=0), v=Side(1, 32, "lsq", owner=0)),
    "log8 keys": Case(k=Side(4, 64, "minmax", "log8")),
    "head 128": Case(d=128, e=128, n_rows=4),
    "head 256": Case(d=256, e=256, n_rows=1),
    "head 80": Case(d=80, e=80, k=Side(1, 128), n_rows=2),
    "head 96": Case(d=96, e=96, k=Side(3, 64), v=Side(3, 32), n_rows=5),
    "two widths": Case(d=128, e=64, n_rows=7),
    "many rows": Case(n_rows=70, seed=3),
    "open only": Case(states=(0, 1, 2), n_rows=9),
    "open only, one row": Case(states=(0, 1, 2), n_rows=1),
    "open only, odd rows": Case(states=(1, 0), n_rows=67, d=80, e=96),
    "softcap": Case(softcap=2.0),
    "alibi": Case(slope=0.25),
    "sink": Case(sink=1.5),
    "no mask": Case(masked=False),
    "mapped": Case(v=replace(V, bits=1), source=V),
    "mapped from 1 bit, head 128": Case(d=128, e=128, source=replace(V, bits=1), n_rows=5),
    "mapped, nothing left over": Case(v=Side(0, 0, rotate=True), source=replace(V, bits=3), n_rows=70),
    "mapped from groups": Case(d=96, e=96, v=Side(2, 32, "paper"), source=Side(4, 32, "clip")),
}
