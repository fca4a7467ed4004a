"""Layers of random codes, and attention over them: the cases that every device answers, and what is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support import specification
from support.devices import Device, device
from support.storage import BYTES, SEALED, Floats, Halves, Storage
from xquant_gguf import reference
from xquant_gguf.plan import PAGE, Layer, Side

V = Side(2, 0, "lloyd", "log8", True)


@dataclass(frozen=True)
class Case:
    """One call of attend.  table: slots of a stream's pages; a second stream has them the other way round."""

    k: Side = Side(4, 128)
    v: Side = V
    d: int = 64
    e: int = 0  # 0: d
    latent: bool = False  # the values are the first e channels of the keys,
    own: int = 0  # and so many more of their own
    heads: int = 2
    n_rep: int = 2
    n_tokens: int = 1
    n_streams: int = 1
    table: Sequence[int] = (0, -1, -1, -2, -1, 1)
    softcap: float = 0.0
    max_bias: float = 0.0
    sinks: bool = False
    masked: bool = True
    source: Side | None = None  # V is what a random map of such values leaves over
    cuda: str = ""  # the kernel that a GPU takes; "": any


CASES = {
    "default": Case(),
    **{
        f"k{k} v{v} d{d}": Case(Side(k, 128), replace(V, bits=v), d, n_rep=4, cuda="decode")
        for k in (1, 2, 3, 4)
        for v in (1, 2)
        for d in (64, 128)
    },
    "k1 v3": Case(Side(1, 128), replace(V, bits=3), cuda="wide"),
    "k4 v4": Case(v=replace(V, bits=4), cuda="wide"),
    "groups of keys": Case(Side(4, 32), d=128, cuda="decode"),
    "keys that come rotated": Case(Side(3, 128, "lloyd", rotate=True, eta=0.06), d=128, cuda="decode"),
    "log8 keys": Case(Side(4, 64, "minmax", "log8"), cuda="decode"),
    "f16 values, not rotated": Case(Side(2, 128, "clip"), Side(2, 0), d=128, cuda="decode"),
    "paper": Case(Side(2, 32, "paper"), Side(2, 32, "paper"), cuda="wide"),
    "means": Case(Side(0, 64), Side(0, 0), cuda="general"),
    "borrowed": Case(Side(2, 64, "lsq", owner=0), Side(1, 32, "lsq", owner=0)),
    "keys borrowed": Case(Side(4, 128, "minmax", owner=0), n_tokens=3),
    "values borrowed": Case(v=Side(2, 0, "lsq", rotate=True, owner=0), d=128, cuda="decode"),
    "few bits, three rows": Case(Side(2, 128), replace(V, bits=1), d=128, n_rep=3, cuda="decode"),
    "few bits, two tokens": Case(Side(2, 128), replace(V, bits=1), d=128, n_rep=4, n_tokens=2, cuda="decode"),
    "head 16": Case(d=16, n_tokens=5),
    "head 80": Case(Side(1, 128), d=80, n_tokens=3),
    "head 96": Case(Side(3, 64), Side(3, 32), d=96, n_rep=5, n_tokens=2, cuda="wide"),
    "head 256": Case(Side(3, 64), d=256, n_rep=1, cuda="wide"),
    "head 512": Case(d=512, heads=1, cuda="wide"),
    "two widths": Case(d=128, e=64, n_rep=7),
    **{
        f"k{k} v{v} d{d} e{e} rows {n_rep}": Case(
            Side(k, 128), replace(V, bits=v), d, e, heads=1, n_rep=n_rep, table=(0, -1, -2, -1), cuda="wide"
        )
        for k, v, d, e, n_rep in (
            (1, 1, 80, 80, 16),
            (4, 3, 96, 96, 4),
            (3, 4, 112, 112, 8),
            (2, 3, 128, 128, 16),
            (4, 4, 192, 128, 1),
            (1, 2, 192, 192, 16),
            (2, 1, 256, 256, 4),
            (4, 2, 256, 256, 16),
            (3, 3, 320, 256, 9),
            (1, 4, 512, 512, 8),
            (3, 1, 512, 512, 16),
            (4, 2, 576, 512, 16),
            (2, 4, 64, 512, 12),
            (4, 1, 576, 16, 16),
            (2, 2, 128, 400, 20),
        )
    },
    **{
        f"one token, k{k} v{v} d{d} rows {n_rep}": Case(
            Side(k, 128),
            replace(V, bits=v),
            d,
            heads=1,
            n_rep=n_rep,
            n_streams=2,
            table=(0, *[-1] * n_sealed, -2, 1),
            cuda="wide",
        )
        for k, v in [(4, 2), (3, 2), (2, 1), (4, 4)]
        for d, n_rep, n_sealed in [(256, 6, 5), (256, 16, 9), (512, 8, 9)]
    },
    "head 256, three tiles of rows": Case(d=256, heads=2, n_rep=35, sinks=True, cuda="wide"),
    "head 256, open only": Case(d=256, n_rep=12, n_streams=2, table=(0, 2, 1), cuda="wide"),
    "head 256, groups of values": Case(v=Side(4, 32, "paper"), d=256, n_rep=16, heads=1, n_tokens=2, cuda="wide"),
    "head 512, groups of values": Case(v=Side(3, 64, "paper", "log8"), d=512, n_rep=8, heads=1, cuda="wide"),
    "head 128, groups of values": Case(v=replace(V, bits=1, group=32), d=128, n_rep=16, heads=1, cuda="wide"),
    "head 256, tiles": Case(Side(3, 32, "paper"), V, 256, n_rep=12, heads=1, softcap=8.0, cuda="wide"),
    "head 256, tiles of log8": Case(Side(2, 64, "minmax", "log8"), d=256, heads=1, n_rep=4, n_tokens=5, sinks=True),
    "head 256, alibi": Case(replace(Side(4, 128), eta=0.0), d=256, n_rep=6, n_tokens=4, max_bias=8.0, cuda="wide"),
    "head 256, two streams": Case(d=256, e=128, n_rep=5, n_tokens=4, n_streams=2, sinks=True, cuda="wide"),
    "head 256, values borrowed": Case(v=Side(2, 0, "lsq", rotate=True, owner=0), d=256, n_rep=12, cuda="wide"),
    "head 256, no mask": Case(d=256, heads=1, n_rep=16, masked=False, cuda="wide"),
    "head 512, open only": Case(d=512, heads=1, n_rep=16, n_tokens=2, table=(0, 2, 1), cuda="wide"),
    "three KV heads, seven rows": Case(heads=3, n_rep=7, d=128, cuda="decode"),
    "one row": Case(heads=1, n_rep=1, d=128, cuda="decode"),
    "a group of rows and some": Case(n_rep=2, n_tokens=35),
    "three groups of rows": Case(Side(2, 128), heads=1, n_rep=5, n_tokens=26, table=(-1, 0, -1)),
    "open only": Case(table=(0, 1, 2), n_rep=3, n_tokens=3),
    "open only, one row": Case(table=(0, 1, 2), n_rep=1),
    "open only, odd rows": Case(table=(1, 0), n_rep=1, n_tokens=67, d=80, e=96),
    "softcap": Case(softcap=2.0),
    "softcap and sinks": Case(d=128, n_rep=4, softcap=20.0, sinks=True, cuda="decode"),
    "softcap and sinks, many rows": Case(d=96, n_tokens=9, softcap=20.0, sinks=True, cuda="wide"),
    "alibi": Case(n_rep=3, n_tokens=4, max_bias=8.0),
    "sinks": Case(sinks=True, n_tokens=2),
    "no mask": Case(masked=False),
    "two streams": Case(n_streams=2, n_tokens=3, n_rep=3),
    "two streams, groups, sinks": Case(
        Side(3, 64), n_streams=2, n_tokens=23, n_rep=3, sinks=True, table=(-1, 0, -1, 1)
    ),
    **{
        f"latent k{k} d{d}": Case(Side(k, 128), d=d, e=e, heads=1, n_rep=16, latent=True, cuda="wide")
        for k in (1, 2, 3, 4)
        for d, e in ((576, 512), (320, 256))
    },
    "latent, tiles": Case(Side(3, 32), d=96, e=80, heads=2, n_rep=3, n_tokens=5, latent=True, cuda="wide"),
    "latent, tiles of two": Case(Side(1, 64, "clip"), d=80, e=48, heads=1, n_rep=7, latent=True, sinks=True),
    "latent, log8": Case(Side(4, 128, "minmax", "log8"), d=64, e=64, n_rep=2, n_tokens=3, latent=True, softcap=9.0),
    "latent, alibi": Case(Side(2, 128), d=320, e=256, heads=1, n_rep=3, n_tokens=3, latent=True, max_bias=8.0),
    "latent, tiles of 3 bits": Case(Side(3, 64), d=576, e=512, heads=1, n_rep=8, n_tokens=2, latent=True, cuda="wide"),
    "latent, means": Case(Side(0, 64), d=64, e=16, n_rep=2, n_streams=2, latent=True, max_bias=8.0),
    "latent and own": Case(d=64, e=48, own=16, n_rep=5, latent=True, n_tokens=3),
    "latent and own, wide": Case(
        v=replace(V, bits=1), d=512, e=384, own=128, heads=1, n_rep=8, latent=True, sinks=True
    ),
    "latent and own groups": Case(Side(2, 64), Side(3, 32), d=96, e=80, own=96, n_streams=2, latent=True),
    "latent, borrowed": Case(Side(4, 128, "lsq", owner=0), d=80, e=64, n_rep=1, n_tokens=35, latent=True),
    "mapped": Case(v=replace(V, bits=1), source=V),
    "mapped from 1 bit": Case(d=128, source=replace(V, bits=1), n_tokens=5),
    "mapped, nothing left over": Case(v=Side(0, 0, rotate=True), source=replace(V, bits=3), n_tokens=35),
    "mapped from groups": Case(d=96, v=Side(2, 32, "paper"), source=Side(4, 32, "clip")),
    "mapped, two streams": Case(source=V, n_streams=2, n_tokens=2, sinks=True),
}
# the same with pages in bytes, byte slot n being BYTES - n
CASES |= {
    f"{name}, bytes": replace(CASES[name], table=table)
    for name, table in {
        **dict.fromkeys(
            ("default", "k1 v1 d64", "k2 v2 d128", "k3 v1 d128", "k3 v2 d64", "groups of keys", "few bits, two tokens"),
            (0, -1, BYTES, -2, -1, BYTES - 1, BYTES - 2),
        ),
        **dict.fromkeys(
            ("softcap and sinks", "alibi", "no mask", "means", "mapped", "head 16", "two widths", "k4 v4"),
            (BYTES - 1, -1, 0, BYTES, BYTES - 2),
        ),
        **dict.fromkeys(
            ("two streams", "two streams, groups, sinks", "head 256, two streams", "latent and own groups"),
            (BYTES, -1, -1, BYTES - 1, 0),
        ),
        **dict.fromkeys(
            ("head 80", "head 96", "k1 v1 d80 e80 rows 16", "k3 v4 d112 e112 rows 8", "k2 v3 d128 e128 rows 16",
             "k4 v4 d192 e128 rows 1", "k3 v1 d512 e512 rows 16", "k2 v2 d128 e400 rows 20", "head 256, no mask",
             "head 512, groups of values"),
            (-1, BYTES, 1, BYTES - 1, 0),
        ),
        **dict.fromkeys(
            ("latent k4 d576", "latent k3 d320", "latent, tiles", "latent, alibi", "latent, means", "latent and own",
             "latent and own, wide", "latent, borrowed"),
            (BYTES, -1, 0, BYTES - 1),
        ),
        **dict.fromkeys(("open only", "open only, odd rows", "a group of rows and some"), (BYTES, 0, BYTES - 1)),
        **dict.fromkeys(("open only, one row", "head 512, open only"), (BYTES, BYTES - 1)),
        **dict.fromkeys(
            tuple(
                f"one token, k{k} v{v} d{d} rows {n_rep}"
                for k, v in [(4, 2), (3, 2), (2, 1), (4, 4)] for d, n_rep in [(256, 6), (256, 16), (512, 8)]
            ),
            (BYTES, *[-1] * 6, -2, BYTES - 1, 0),
        ),
        "head 256, open only": (BYTES, 0, BYTES - 1),
    }.items()
}  # fmt: skip


# ---- layers of random codes ----


def random_parameters(rng: np.random.Generator, side: Side, n: int) -> bytes:
    """Parameters of one group: scales near 0.1, zeros a few scales away."""
    scale, zero = (0.05 + 0.1 * rng.random(n)).astype(np.float32), rng.standard_normal(n).astype(np.float32)
    if side.owner >= 0:
        scale *= rng.choice((-1, 1), n)  # least-squares scales may be negative
    p = reference.round_parameters(scale, zero * np.float32(0.3), max(side.bits, 1), side.param)
    return reference._param_bytes(p, side.bits, side.param)


def random_block(rng: np.random.Generator, layer: Layer, at: Storage) -> NDArray[np.uint8]:
    """One sealed page; what is not codes or parameters is poison."""
    block = np.full(at.layout.bytes, 0xFF, np.uint8)
    for name, side, n_i, n_j in (("k", layer.k, at.d, PAGE), ("v", layer.v, PAGE, at.stored_e))[
        : 2 if at.stored_e else 1
    ]:
        codes_at, param_at = at.part_at(name)
        if side.bits > 0 and side.owner < 0:
            codes = rng.integers(0, 2**side.bits, (n_i, n_j), dtype=np.uint8)
            block[codes_at] = np.frombuffer(reference.pack(codes, side.bits), np.uint8)
        n_groups = n_j // (side.group if 0 < side.group < n_j else n_j)
        param = b"".join(random_parameters(rng, side, n_i) for _ in range(n_groups))
        block[param_at] = np.frombuffer(param, np.uint8)
    return block


@dataclass
class Content:
    """What one layer holds: arrays as Storage takes them."""

    layer: Layer
    rows: tuple[Halves, Halves]
    pages: NDArray[np.uint8] | None = None
    latent: int = 0
    n_bytes: int = 0
    byte_blocks: NDArray[np.uint8] | None = None
    first_block: int = 0

    def put(self, on: Device, n_pages: int, **reads: Any) -> Storage:
        """Storage with this content, or with random codes, which are kept."""
        area: dict[str, Any] = {"latent": self.latent, "n_bytes": self.n_bytes, "first_block": self.first_block}
        out = Storage(on, self.layer, self.rows, n_pages, **area, **reads)
        if self.pages is None:
            rng = np.random.default_rng(n_pages)
            pages = [random_block(rng, self.layer, out) for _ in range(out.streams * out.heads * n_pages)]
            self.pages = np.stack(pages).reshape(out.streams, out.heads, n_pages, -1)
        out.set_pages(self.pages)
        if self.n_bytes and self.byte_blocks is None:
            self.byte_blocks = random_byte_blocks(np.random.default_rng(n_pages), out)
        if self.byte_blocks is not None:
            out.set_byte_blocks(self.byte_blocks)
        return out


def random_byte_blocks(rng: np.random.Generator, at: Storage) -> NDArray[np.uint8]:
    """All pages in bytes, of any bytes; a few channels of keys lie far from zero, as biases make them."""
    blocks = np.full(at.byte_blocks().shape, 0xFF, np.uint8)
    for block in blocks.reshape(-1, blocks.shape[-1]):
        for name in "kv"[: 2 if at.stored_e else 1]:
            codes, param = at.byte_part(block, name)
            codes[:] = rng.integers(-127, 128, codes.shape)
            param[0] = 0.005 + 0.01 * rng.random(param.shape[1])
            param[1] = rng.standard_normal(param.shape[1])
            if name == "k":
                param[1, ::29] += 5
    return blocks


def random_rows(
    rng: np.random.Generator, n_streams: int, heads: int, slots: int, *widths: int
) -> tuple[Halves, Halves]:
    """Open pages: K and V of one or two widths."""
    k, v = (rng.standard_normal((n_streams, heads, slots, PAGE, n), np.float32) for n in (widths[0], widths[-1]))
    return k.astype(np.float16), v.astype(np.float16)


class Made:
    """A case's arrays, the same on every device, and the output that is right."""

    def __init__(self, case: Case) -> None:
        rng = np.random.default_rng(7)
        self.case, e = case, case.e or case.d
        self.table = [list(case.table), list(case.table)[::-1]][: case.n_streams]
        self.n_pages, slots = len(case.table) + 1, max(max(case.table), 0) + 1
        shape = (case.n_streams + 1, case.heads, slots)  # the cache has one stream more
        latent = e if case.latent else 0
        rows = random_rows(rng, *shape, case.d, case.own if latent else e)
        v = Side(0, 0) if latent and not case.own else case.v  # as the fork has it: the plan says nothing of V
        n_bytes = max(0, BYTES + 1 - min(case.table))
        # page 0 needs no block where it is open
        first_block = int(all(slots[0] != SEALED for slots in self.table))
        area: dict[str, Any] = {"latent": latent, "first_block": first_block}
        self.own = Content(Layer(case.k, v), rows, n_bytes=n_bytes, **area)
        owner = Layer(*(replace(s, owner=-1, fit="minmax") for s in (case.k, case.v)))
        self.owner = Content(owner, rows, **area) if case.k.owner >= 0 or case.v.owner >= 0 else None
        self.source, self.map = None, None
        if case.source is not None:
            self.own.layer = Layer(case.k, replace(case.v, source=0))
            self.source = Content(Layer(Side(4, 128), case.source), rows, first_block=first_block)
            heads = np.arange(case.heads, dtype=np.int32)[::-1].copy()
            self.map = heads, (rng.standard_normal((case.heads, e, e)) / e**0.5).astype(np.float32)
        n_head, n_cells = case.heads * case.n_rep, len(case.table) * PAGE
        self.q = (rng.standard_normal((case.n_streams, case.n_tokens, n_head, case.d)) * 1.5).astype(np.float32)
        self.mask = self.made_mask(rng, n_cells) if case.masked else None
        self.sinks = rng.standard_normal(n_head, np.float32) * 3 if case.sinks else None
        self.scale = case.d**-0.5
        pages = specification.Pages(self.put(device("cpu-scalar")))
        keys, values = (pages.stored(name, self.table, 1) for name in "kv")
        self.right = specification.attention(
            self.q, self.table, self.mask, keys, values, scale=self.scale, softcap=case.softcap,
            max_bias=case.max_bias, sinks=self.sinks,
        )  # fmt: skip

    def made_mask(self, rng: np.random.Generator, n_cells: int) -> Halves:
        """A third hidden, and whole pages; with a bias, distances."""
        case = self.case
        mask = np.zeros((case.n_streams, case.n_tokens, n_cells), np.float16)
        mask[rng.random(mask.shape) < 0.3] = -np.inf
        mask[:, :, PAGE : PAGE + 40] = -np.inf
        mask[:, 0, 2 * PAGE : 3 * PAGE] = -np.inf  # a page that one token does not see
        if case.max_bias > 0:
            mask[mask == 0] = -np.arange((mask == 0).sum()) % 7
        return mask

    def put(self, on: Device) -> Storage:
        owner = self.owner.put(on, self.n_pages) if self.owner else None
        source = self.source.put(on, self.n_pages) if self.source else None
        return self.own.put(on, self.n_pages, owner=owner, source=source, map_=self.map)

    def attend(
        self, on: Storage, n_parts: int = 1, n_threads: int = 2, q: Floats | None = None, *, rotate: bool = False
    ) -> Floats:
        case = self.case
        return on.attend(
            self.q if q is None else q, self.table, self.mask, first_stream=1, scale=self.scale, softcap=case.softcap,
            max_bias=case.max_bias, sinks=self.sinks, n_parts=n_parts, n_threads=n_threads, rotate=rotate,
        )  # fmt: skip


@cache
def made(name: str) -> Made:
    return Made(CASES[name])


# Largest error of an output in units of the largest output, by kernel.  Exact ones are single precision; the others
# round the vectors that are multiplied with codes to 8 bits; "decode" rounds queries, and vectors that are multiplied
# with codes, to F16 or 16-bit integers, "wide" to F16.  Measured over these cases: scalar 1.5e-6, avx2 and neon 3.1e-3,
# wide 6e-4; over those of test_cuda_kernels.py: general 3.7e-6, decode 3.2e-3, wide 4.0e-3 (600 pages in one part).
TOLERANCE = {"scalar": 3e-6, "general": 1e-5, "decode": 5e-3, "wide": 5e-3}
TOLERANCE |= dict.fromkeys(("avx2", "avxvnni", "avx512", "neon", "neon-dotprod", "neon-i8mm"), 4e-3)


def tolerance(kernel: str, table: Sequence[int]) -> float:
    """Open pages are exact on a CPU."""
    exact = kernel not in ("decode", "wide", "general") and all(slot != -1 for slot in table)
    return TOLERANCE["scalar" if exact else kernel]
