"""What only the CUDA backend does: many pages in few buffers, tiles of rows, launches that overtake, a GPU's limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from support import specification
from support.devices import Buffer, Refused, device
from support.gpu import Cuda, Graph
from support.pages_of_codes import V, random_rows, tolerance
from support.specification import Pages
from support.storage import NONE, SEALED, Floats, Halves, Move, Storage
from xquant_gguf import native
from xquant_gguf.plan import PAGE, Layer, Side

pytestmark = pytest.mark.cuda

HEADS, N_REP = 2, 4


@pytest.fixture
def on() -> Cuda:
    cuda = device("cuda")
    assert isinstance(cuda, Cuda)
    return cuda


def check_attention(
    storage: Storage, q: Floats, table: list[int], mask: Halves, keys: Floats, values: Floats, parts: tuple[int, ...]
) -> None:
    """q, mask [token]..., keys and values [KV head][cell][width], against attention in double precision."""
    scale = q.shape[-1] ** -0.5
    right = specification.attention(q[None], [table], mask[None], keys[None], values[None], scale=scale)
    bound = tolerance(storage.device.attend_kernel(storage.c), table) * np.abs(right).max()
    for n_parts in parts:
        out = storage.attend(q[None], [table], mask[None], scale=scale, n_parts=n_parts)
        assert np.abs(out - right).max() <= bound, n_parts


# ---- many pages ----


SHAPES = [
    ((4, 2), 64, 64),
    ((2, 1), 64, 64),
    ((4, 2), 128, 128),
    ((3, 1), 128, 128),
    ((1, 4), 96, 96),
    ((3, 2), 256, 256),
    ((4, 2), 320, 0),
]


@pytest.mark.parametrize(
    ("bits", "d", "e", "n_tokens"), [*((*shape, n) for shape in SHAPES for n in (1, 2)), ((4, 2), 512, 512, 1)]
)
def test_many_pages(on: Cuda, bits: tuple[int, int], d: int, e: int, n_tokens: int) -> None:
    """More than a block has room for: buffers are filled again and again.  Some masks are neither 0 nor -inf.  No width
    of values: they are the first 256 channels of keys."""
    rng, n_pages = np.random.default_rng(11), 600
    layer = Layer(Side(bits[0], 128), replace(V, bits=bits[1]))
    storage = Storage(on, layer, random_rows(rng, 1, HEADS, 3, d, e), n_pages, latent=0 if e else 256)
    storage.update([Move(page, page % 3) for page in range(n_pages)])
    q = rng.standard_normal((n_tokens, HEADS * N_REP, d), dtype=np.float32)
    mask = np.zeros((n_tokens, n_pages * PAGE), np.float16)
    mask[0, 7 * PAGE : 590 * PAGE] = -np.inf
    mask[:, 3 * PAGE : 5 * PAGE] = rng.standard_normal(2 * PAGE)
    three = Pages(storage)
    keys, values = (np.tile(three.stored(name, [[SEALED] * 3])[0], (1, n_pages // 3, 1)) for name in "kv")
    check_attention(storage, q, [SEALED] * n_pages, mask, keys, values, (1, 3, n_pages))


@pytest.mark.parametrize("v_bits", [1, 2, 3, 4])
@pytest.mark.parametrize("share", [0.5, 0.99])
def test_tokens_beside_a_far_heavier_one_count(on: Cuda, v_bits: int, share: float) -> None:
    """One token of 38,400 has as much weight as the others together, or 99 times as much; each of those has less than
    a rounding of its weight to 16 bits of the heaviest's can tell from nothing."""
    rng, n_pages, heavy, d = np.random.default_rng(13), 300, 150, 128
    rows = random_rows(rng, 1, HEADS, 3, d)
    rows[1][:] += np.float16(1.0)  # what is lost of the others must show
    q = np.repeat(rng.standard_normal((1, HEADS, d), dtype=np.float32), N_REP, 1)
    for head in range(HEADS):
        across = q[0, head * N_REP].astype(np.float64)
        keys = rows[0][0, head].astype(np.float64)
        keys -= (keys @ across)[..., None] * across / (across @ across)  # every score 0 but for the rounding of keys
        keys[2, 64] = across * np.log((n_pages * PAGE) * (1 - share) / share) * d**0.5 / (across @ across)
        rows[0][0, head] = keys.astype(np.float16)
    storage = Storage(on, Layer(Side(4, 128), replace(V, bits=v_bits)), rows, n_pages)
    slots = [2 if page == heavy else page % 2 for page in range(n_pages)]
    storage.update([Move(page, slot) for page, slot in enumerate(slots)])
    three = [SEALED, SEALED, *[NONE] * (heavy - 2), SEALED]
    stored = (Pages(storage).stored(name, [three])[0].reshape(HEADS, -1, PAGE, d) for name in "kv")
    keys, values = (x[:, [(0, 1, heavy)[slot] for slot in slots]].reshape(HEADS, -1, d) for x in stored)
    mask = np.zeros((1, n_pages * PAGE), np.float16)
    check_attention(storage, q, [SEALED] * n_pages, mask, keys, values, (1, 3, n_pages))


# ---- rows ----


@pytest.mark.parametrize(("n_rep", "v_bits"), [(1, 2), (3, 2), (7, 2), (5, 4)])
def test_more_than_four_thousand_tokens(on: Cuda, n_rep: int, v_bits: int) -> None:
    """Which token and head a row belongs to is found by a multiplication, which must be exact for all."""
    rng, table, n_tokens = np.random.default_rng(n_rep), [SEALED, 0], 4200
    storage = Storage(on, Layer(Side(4, 128), replace(V, bits=v_bits)), random_rows(rng, 1, 1, 1, 64), 2)
    storage.update([Move(0, 0)])
    q = rng.standard_normal((n_tokens, n_rep, 64), dtype=np.float32)
    mask = np.zeros((n_tokens, 2 * PAGE), np.float16)
    mask[np.arange(2 * PAGE) > np.arange(n_tokens)[:, None] % 255] = -np.inf  # each token sees another number of cells
    keys, values = (Pages(storage).stored(name, [table])[0] for name in "kv")
    assert on.attend_kernel(storage.c) == ("decode" if v_bits == 2 else "wide")
    check_attention(storage, q, table, mask, keys, values, (1, 2))


# ---- launches that overtake ----


class Step:
    """One token of a model as launches of one layer: its row is written, then attention reads it."""

    def __init__(self, on: Cuda, storage: Storage, rng: np.random.Generator, slot: int, table: list[int]) -> None:
        ffi, lib = native.load()
        self.on, self.storage, heads, d = on, storage, storage.heads, storage.d
        self.new = rng.standard_normal((2, 1, heads, d), dtype=np.float32)
        self.q = rng.standard_normal((1, heads * N_REP, d), dtype=np.float32)
        self.row = slot * PAGE + int(rng.integers(PAGE))
        self.keep = [
            Buffer(on, np.array([self.row], np.int32)),
            Buffer(on, self.new),
            Buffer(on, self.q),
            Buffer(on, np.array(table, np.int32)),
            Buffer(on, np.zeros(64, np.uint32)),
            Buffer(on, np.zeros(1, np.uint64)),
        ]
        u, a = ffi.new("xq_update_args *"), ffi.new("xq_attend_args *")
        u.rows, u.k_cur, u.n_tokens = self.keep[0].pointer("int32_t"), self.keep[1].pointer("float"), 1
        u.v_cur, u.n_nonfinite = u.k_cur + heads * d, self.keep[5].pointer("uint64_t")
        u.k_head_stride = u.v_head_stride = 4 * d
        u.k_token_stride = u.v_token_stride = 4 * d * heads
        a.q, a.q_head_stride, a.q_token_stride = self.keep[2].pointer("float"), 4 * d, 4 * d * heads * N_REP
        a.table, a.arrivals = self.keep[3].pointer("int32_t"), self.keep[4].pointer("uint32_t")
        a.n_head, a.n_tokens, a.n_streams, a.n_kv_pages = heads * N_REP, 1, 1, len(table)
        a.scale, a.n_parts, a.after_update = d**-0.5, 3, 1
        self.out = Buffer(on, 4 * heads * N_REP * storage.e)
        self.partial = Buffer(on, 4 * int(lib.xq_attend_states(storage.c, a)))
        a.out, a.partial = self.out.pointer("float"), self.partial.pointer("float")
        self.update, self.attend = u, a

    def enqueue(self, stream: int) -> None:
        self.on.enqueue("update", self.storage.c, self.update, stream)
        self.on.enqueue("attend", self.storage.c, self.attend, stream)


@pytest.mark.parametrize(
    ("kernel", "v", "d"),
    [("decode", V, 128), ("wide", replace(V, bits=4), 128), ("wide", V, 256), ("general", Side(0, 0), 128)],
)
def test_attention_that_overtakes_an_update_reads_what_it_wrote(on: Cuda, kernel: str, v: Side, d: int) -> None:
    """Forty layers' updates and attentions in one graph, many times, against the same one after the other: each has the
    bits that it has when everybody waits.  Outputs are overwritten between, so that no earlier one can pass."""
    rng, table = np.random.default_rng(21), [SEALED] * 6 + [0, 1]
    layer = Layer(Side(4, 128), v)
    storages = [Storage(on, layer, random_rows(rng, 1, HEADS, 2, d), 8) for _ in range(40)]
    assert on.attend_kernel(storages[0].c) == kernel
    for storage in storages:
        storage.update([Move(page, page % 2) for page in range(6)])
    steps = [Step(on, storage, rng, int(rng.integers(2)), table) for storage in storages]
    right = []
    for step in steps:
        step.attend.after_update = 0
        on.verb("update", step.storage.c, step.update)
        on.verb("attend", step.storage.c, step.attend)
        right.append(step.out.get(np.float32, (HEADS * N_REP, d)))
        step.attend.after_update = 1
    before = [random_rows(np.random.default_rng(i), 1, HEADS, 2, d) for i in range(len(steps))]
    for i, step in enumerate(steps):  # rows as they were, but for the one that is written
        for x, written in zip(before[i], step.storage.rows(), strict=True):
            x[:] = written
            x.reshape(1, HEADS, -1, d)[:, :, step.row] = np.float16(7.0)

    def all_layers(stream: int) -> None:
        for step in steps:
            step.enqueue(stream)

    graph = Graph(all_layers)
    for _ in range(20):
        for i, step in enumerate(steps):
            step.storage.set_rows(before[i])
            step.out.set(np.full((HEADS * N_REP, d), np.nan, np.float32))
        on.synchronize()
        graph.milliseconds()
        for step, want in zip(steps, right, strict=True):
            np.testing.assert_array_equal(step.out.get(np.float32, want.shape), want)


# ---- a GPU's limits ----


@pytest.mark.parametrize(("d", "v_bits"), [(128, 2), (128, 3), (256, 2), (64, 0)])
def test_codes_of_a_page_that_has_no_block_are_not_looked_for(on: Cuda, d: int, v_bits: int) -> None:
    """A table or a move that says so, whoever wrote it, says nothing: by every kernel of attention."""
    rng = np.random.default_rng(d)
    layer = Layer(Side(4, 128), replace(V, bits=v_bits))
    storage = Storage(on, layer, random_rows(rng, 1, HEADS, 3, d), 5, first_block=2)
    storage.update([Move(2, 0), Move(4, 1)])
    pages, rows = storage.pages(), storage.rows()
    q = rng.standard_normal((1, 1, HEADS * N_REP, d), np.float32)
    named, unnamed = [[SEALED, SEALED, SEALED, 2, SEALED]], [[NONE, NONE, SEALED, 2, SEALED]]
    np.testing.assert_array_equal(storage.attend(q, named), storage.attend(q, unnamed))
    for is_k in (True, False):
        np.testing.assert_array_equal(storage.unpack(named, is_k), storage.unpack(unnamed, is_k))
    storage.update([Move(1, 0)])
    storage.update(unseals=[Move(0, 0)])
    storage.write_keys([Move(1, SEALED)], np.ones((1, PAGE, HEADS, d), np.float32))
    np.testing.assert_array_equal(storage.pages(), pages)
    for now, was in zip(storage.rows(), rows, strict=True):
        np.testing.assert_array_equal(now, was)


def made(on: Cuda, n_pages: int = 4) -> Storage:
    return Storage(on, Layer(Side(4, 128), V), random_rows(np.random.default_rng(0), 1, HEADS, 1, 64), n_pages)


def refused(change: Callable[[Any], None], storage: Storage, message: str) -> None:
    """A call of attend whose arguments were changed."""
    step = Step(storage.device, storage, np.random.default_rng(0), 0, [SEALED] * 4)  # type: ignore[arg-type]
    change(step.attend)
    with pytest.raises(Refused, match=message):
        step.on.verb("attend", storage.c, step.attend)


def set_to(name: str, value: int) -> Callable[[Any], None]:
    return lambda args: setattr(args, name, value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q_head_stride", 264, "attend on a GPU: q_head_stride is 264, must be a multiple of 16"),
        ("n_tokens", 65536, r"attend on a GPU: n_streams \* n_tokens is 65536, must be 1 to 65535"),
        ("n_head", HEADS * 80000, "attend on a GPU: .*n_head / n_head_kv.* is 6400000000, must be 1 to 2147483647"),
    ],
)
def test_attention_that_a_gpu_cannot_launch(on: Cuda, name: str, value: int, message: str) -> None:
    refused(set_to(name, value), made(on), message)


def test_an_address_that_is_not_a_multiple_of_16(on: Cuda) -> None:
    def move(args: Any) -> None:
        args.q += 1

    refused(move, made(on), "attend on a GPU: address of q is [0-9]+, must be a multiple of 16")
    storage = made(on)
    storage.c.k.param += 8
    refused(lambda args: None, storage, "store.k on a GPU: address of param is [0-9]+, must be a multiple of 16")
    storage = made(on)
    storage.c.v.rows_head += 4
    refused(lambda args: None, storage, "store.v on a GPU: rows_head is [0-9]+, must be a multiple of 8")


def test_parts_with_more_pages_than_a_block_lists(on: Cuda) -> None:
    storage, q = made(on, 2049), np.zeros((1, 1, HEADS, 64), np.float32)
    with pytest.raises(Refused, match="attend on a GPU: n_kv_pages is 2049 in n_parts, 2; a part has at most 1024"):
        storage.attend(q, [[NONE] * 2049], n_parts=2)
    assert (storage.attend(q, [[NONE] * 2049], n_parts=3) == 0).all()


def test_moves_that_a_gpu_cannot_launch(on: Cuda) -> None:
    storage = made(on)
    words = Buffer(on, np.zeros((1, 9), np.int32))
    args = native.load()[0].new("xq_update_args *")
    args.unseals, args.n_unseals = words.pointer("int32_t"), 65536
    with pytest.raises(Refused, match="update on a GPU: n_unseals is 65536, must be 0 to 65535"):
        on.verb("update", storage.c, args)


def test_no_exec(on: Cuda) -> None:
    ffi, _ = native.load()
    step = Step(on, made(on), np.random.default_rng(0), 0, [SEALED] * 4)
    for verb, args in (("update", step.update), ("attend", step.attend)):
        assert getattr(on.backend, verb)(step.storage.c, args, ffi.NULL) < 0
        assert on.error() == f"{verb}: exec must not be null"
