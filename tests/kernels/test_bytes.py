"""Pages in bytes on every device: smaller, larger, sealed from there, unpacked, and read and written for a shift.

Attention over them is among the cases of test_attend.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from support.codec_rows import KINDS, made_rows
from support.devices import Device
from support.pages_of_codes import V, random_rows
from support.specification import Pages, attention, finite
from support.storage import ALL, BYTES, NONE, SEALED, Bools, Halves, Move, Storage
from xquant_gguf import reference
from xquant_gguf.plan import PAGE, Layer, Side

HEADS = 2
PLAIN = Layer(Side(4, 128), V)
LAYERS = (
    PLAIN,
    Layer(Side(3, 32, "clip", "log8"), Side(3, 32, "paper", "f16", eta=0.05)),
    Layer(Side(1, 64, "lloyd"), Side(4, 0, "clip", "log8", True)),
    Layer(Side(0, 128), Side(0, 0)),
)


def f16(x: NDArray[Any]) -> Halves:
    return np.clip(x, -65504, 65504).astype(np.float16)


def some_valid(seed: int) -> Bools:
    rng = np.random.default_rng(seed)
    valid = rng.random(PAGE) < 0.5
    valid[rng.integers(PAGE)] = True
    return valid


def biased_rows(seed: int, *shape: int) -> tuple[Halves, Halves]:
    """Rows (streams, slots, d, e) whose keys have constant parts, some of them large."""
    streams, slots, d, e = shape
    rng = np.random.default_rng(seed)
    k, v = random_rows(rng, streams, HEADS, slots, d, e)
    return (k * rng.lognormal(0, 0.7, d) + 30 * rng.standard_normal(d)).astype(np.float16), v


def parts(storage: Storage, move: Move, head: int, name: str) -> tuple[NDArray[np.int8], Halves]:
    """Bytes and parameters of where a move made a page smaller."""
    return storage.byte_part(storage.byte_blocks()[move.stream, head, BYTES - move.small], name)


def check_bytes(storage: Storage, rows: tuple[Halves, Halves], move: Move) -> int:
    """A page became the reference's bytes; how many inputs were not finite."""
    n_bad = 0
    for head in range(storage.heads):
        for name, x in zip("kv"[: 2 if storage.stored_e else 1], rows, strict=False):
            codes, param, bad = reference.shrink(x[move.stream, head, move.slot], move.valid, name == "k")
            got = parts(storage, move, head, name)
            np.testing.assert_array_equal(got[0], codes, f"{name} of {move}")
            np.testing.assert_array_equal(got[1].view(np.uint16), param.view(np.uint16), f"{name} of {move}")
            n_bad += bad
    return n_bad


# ---- the reference itself ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_k", [True, False])
def test_half_a_step_is_the_largest_error(kind: str, is_k: bool) -> None:
    """Also where scales are no normal F16 numbers, and where values are nearly too large: no byte is clamped."""
    for seed in range(5):
        rows = made_rows(kind, 96, seed)
        codes, param, _ = reference.shrink(rows, ALL, is_k)
        scale = param[0].astype(np.float64)[(None, slice(None)) if is_k else (slice(None), None)]
        off = np.abs(reference.widen(codes, param, is_k).astype(np.float64) - rows.astype(np.float64))
        assert (off <= scale * (0.5 + 1e-3)).all()
        assert codes.min() >= -127
        assert np.isfinite(param).all()


def test_a_constant_group_is_exact() -> None:
    for value in (0.0, -3.14, 65504.0, 6e-8):
        rows = np.full((PAGE, 16), value, np.float16)
        for is_k in (True, False):
            codes, param, _ = reference.shrink(rows, ALL, is_k)
            assert not codes.any()
            assert (reference.widen(codes, param, is_k) == rows).all()


def test_a_large_constant_part_costs_nothing() -> None:
    """Keys with biases (Qwen2): bytes count from the centre as it is stored, which F16 rounds by up to 0.25 here."""
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((PAGE, 64)) + 300.3).astype(np.float16)
    off = reference.widen(*reference.shrink(rows, ALL, True)[:2], True) - rows.astype(np.float32)
    assert np.abs(off).max() <= 0.02


# ---- update ----


@pytest.mark.parametrize(("d", "e"), [(64, 128), (80, 96), (16, 576), (576, 16)])
def test_pages_become_bytes_and_rows_again(coder: Device, d: int, e: int) -> None:
    rows = biased_rows(d, 2, 3, d, e)
    rows[0][:, :, 1, 5, 3], rows[1][:, :, 1, 7, 2], rows[0][:, :, 1, 6, 3] = np.inf, np.nan, -np.inf
    storage = Storage(coder, PLAIN, rows, 4, n_bytes=3)
    before, blocks = storage.byte_blocks(), storage.pages()
    moves = [
        Move(3, 0, small=BYTES - 2),
        Move(0, 1, some_valid(1), small=BYTES),
        Move(2, 2, some_valid(2), 1, small=BYTES - 1),
    ]
    n_bad = storage.update(moves, n_threads=3)
    assert n_bad == sum(check_bytes(storage, rows, move) for move in moves)
    after = storage.byte_blocks()
    for stream, slot in ((0, 1), (1, 0), (1, 2)):
        np.testing.assert_array_equal(after[stream, :, slot], before[stream, :, slot])
    for now, x in zip(storage.rows(), rows, strict=True):
        np.testing.assert_array_equal(now, x)
    storage.update(unseals=[Move(3, 2, small=BYTES - 2), Move(2, 0, stream=1, small=BYTES - 1)], n_threads=3)
    pages = Pages(storage)
    for name, now, x in zip("kv", storage.rows(), rows, strict=True):
        want = x.copy()
        for head in range(HEADS):
            want[0, head, 2] = f16(pages.widened(name, 0, head, 2))
            want[1, head, 0] = f16(pages.widened(name, 1, head, 1))
        np.testing.assert_array_equal(now, want)
    np.testing.assert_array_equal(storage.byte_blocks(), after)
    np.testing.assert_array_equal(storage.pages(), blocks)


def test_rows_that_are_traps(coder: Device) -> None:
    """Constant channels, outliers, zeros, numbers too small or nearly too large for F16: the reference's bytes."""
    n = len(KINDS)
    x = [np.stack([made_rows(kind, width, i) for i, kind in enumerate(KINDS)])[None, None] for width in (80, 96)]
    storage = Storage(coder, PLAIN, (x[0], x[1]), n, n_bytes=n)
    moves = [Move(n - 1 - slot, slot, small=BYTES - slot) for slot in range(n)]
    assert storage.update(moves, n_threads=3) == 0
    for move in moves:
        check_bytes(storage, (x[0], x[1]), move)
    storage.update(unseals=moves)
    pages = Pages(storage)
    for name, now in zip("kv", storage.rows(), strict=True):
        for slot in range(n):
            np.testing.assert_array_equal(now[0, 0, slot], f16(pages.widened(name, 0, 0, slot)))


def test_slots_are_refilled_from_the_stage(coder: Device) -> None:
    """When their page has become bytes, and as it becomes bytes; a page of the stage may become bytes as well."""
    rows = biased_rows(9, 2, 5, 80, 96)
    storage = Storage(coder, PLAIN, rows, 4, n_bytes=3, staged=2)
    moves = [
        Move(0, 1, some_valid(1), 1, refill=3, small=BYTES),
        Move(1, 2, stream=0, small=BYTES - 2),
        Move(3, 4, small=BYTES - 1),
        Move(2, NONE, small=BYTES),
    ]
    assert storage.update(moves, n_threads=3) == 0
    for move in moves[:2]:
        check_bytes(storage, rows, move)
    for name, now, x in zip("kv", storage.rows(), rows, strict=True):
        want = x[:, :, :3].copy()
        want[1, :, 1] = x[0, :, 3]
        np.testing.assert_array_equal(now, want)
        for head in range(HEADS):  # the stage belongs to no stream
            codes, _, _ = reference.shrink(x[0, head, 4], ALL, name == "k")
            np.testing.assert_array_equal(parts(storage, moves[2], head, name)[0], codes)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_codes_from_bytes_are_those_of_the_rows_they_stand_for(coder: Device, layer: Layer) -> None:
    rows = biased_rows(3, 2, 2, 80, 96)
    storage = Storage(coder, layer, rows, 4, n_bytes=2)
    storage.update([Move(0, 0, some_valid(5), small=BYTES), Move(1, 1, stream=1, small=BYTES - 1)])
    bytes_before, pages = storage.byte_blocks(), Pages(storage)
    moves = [Move(3, BYTES, some_valid(5)), Move(0, BYTES - 1, some_valid(6), 1)]
    assert storage.update(moves, n_threads=3) == 0
    after = Pages(storage)
    for move in moves:
        for head in range(HEADS):
            for name, side, seal in (("k", layer.k, reference.seal_k), ("v", layer.v, reference.seal_v)):
                widened = f16(pages.widened(name, move.stream, head, BYTES - move.slot))
                codes, param = seal(side, widened, move.valid)[:2]
                got = after.parts(storage, name, move.stream, head, move.page)
                assert got == (codes if side.bits else got[0], param), f"{name} of {move}"
    np.testing.assert_array_equal(storage.byte_blocks(), bytes_before)


def test_codes_of_others_from_bytes(coder: Device) -> None:
    """Borrowed codes, and values that another layer predicts."""
    rows, other = biased_rows(1, 1, 1, 64, 64), biased_rows(2, 1, 1, 64, 64)
    owner = Storage(coder, Layer(Side(2, 64), V), other, 2)
    owner.update([Move(1, 0)])
    map_ = np.arange(HEADS, dtype=np.int32), (np.eye(64) * 0.5).repeat(HEADS, 0).reshape(64, HEADS, 64)
    weight = np.ascontiguousarray(map_[1].transpose(1, 0, 2)).astype(np.float32)
    layer = Layer(Side(2, 64, "lsq", owner=0), Side(1, 0, "lloyd", "log8", True, source=0))
    storage = Storage(coder, layer, rows, 2, owner=owner, source=owner, map_=(map_[0], weight), n_bytes=1)
    storage.update([Move(1, 0, small=BYTES)])
    storage.update([Move(1, BYTES)])
    pages = Pages(storage)
    for head in range(HEADS):
        keys, values = (f16(pages.widened(name, 0, head, 0)) for name in "kv")
        codes, param = pages.parts(storage, "k", 0, head, 1)
        assert param == reference.seal_k(layer.k, keys, ALL, codes)[1]
        source = pages.parts(owner, "v", 0, head, 1)
        predicted = reference.predict_v(V, 64, *source, weight[head])
        assert pages.parts(storage, "v", 0, head, 1) == reference.seal_v(layer.v, values, ALL, None, predicted)[:2]


@pytest.mark.parametrize("own", [0, 16])
def test_a_latent_layer_keeps_one_row_a_token(coder: Device, own: int) -> None:
    rows = biased_rows(7, 1, 1, 80, 16)[0], random_rows(np.random.default_rng(1), 1, HEADS, 1, own)[1]
    storage = Storage(coder, PLAIN, rows, 2, latent=64, n_bytes=2)
    move = Move(0, 0, some_valid(1), small=BYTES - 1)
    storage.update([move])
    check_bytes(storage, rows, move)
    assert storage.byte_blocks().shape[-1] == 80 * (PAGE + 4) + (own * PAGE + 4 * PAGE if own else 0)
    storage.update([Move(1, BYTES - 1)])
    pages = Pages(storage)
    for head in range(HEADS):
        keys = f16(pages.widened("k", 0, head, 1))
        assert pages.parts(storage, "k", 0, head, 1) == reference.seal_k(PLAIN.k, keys, ALL)[:2]


def test_a_layer_that_never_seals_may_have_bytes(coder: Device) -> None:
    rows = biased_rows(7, 1, 2, 64, 64)
    storage = Storage(coder, PLAIN, rows, 2, seals=False, n_bytes=1)
    storage.update([Move(0, 1, small=BYTES)])
    check_bytes(storage, rows, Move(0, 1, small=BYTES))


# ---- unpack, and both ends of a context shift ----


@pytest.mark.parametrize(("d", "e"), [(64, 128), (80, 96), (16, 512), (576, 64)])
def test_unpacked_pages(coder: Device, d: int, e: int) -> None:
    storage = Storage(coder, PLAIN, biased_rows(4, 2, 2, d, e), 4, n_bytes=2)
    storage.update([Move(0, s, stream=s, small=BYTES - s) for s in (0, 1)] + [Move(2, 1)])
    blocks = storage.byte_blocks()
    blocks[0, :, 1], blocks[1, :, 0] = blocks[1, :, 1], blocks[0, :, 0]  # the others are poison
    for block in (blocks[0, 0, 1], blocks[1, 1, 0]):
        storage.byte_part(block, "k")[1][:, 3] = 600, 65000  # rows are finite, whatever a state brought
        storage.byte_part(block, "v")[1][:, 5] = 600, -65000
    storage.set_byte_blocks(blocks)
    table = [[BYTES, 1, SEALED, BYTES - 1], [NONE, BYTES - 1, BYTES, 0]]
    pages = Pages(storage)
    for name in "kv":
        want = f16(pages.stored(name, table))
        np.testing.assert_array_equal(storage.unpack(table, name == "k"), want)
        np.testing.assert_array_equal(storage.unpack(table, name == "k", slice(1, 2)), want[:, 1:])


@pytest.mark.parametrize("d", [64, 80, 512])
def test_keys_are_read_and_written_again_for_a_shift(coder: Device, d: int) -> None:
    rows = biased_rows(6, 2, 2, d, 64)
    storage = Storage(coder, PLAIN, rows, 4, n_bytes=2)
    storage.update([Move(3, 1, small=BYTES - 1), Move(2, 0), Move(1, 0, stream=1, small=BYTES)])
    before, blocks = storage.byte_blocks(), storage.pages()
    moves = [Move(3, BYTES - 1, some_valid(3)), Move(0, 1), Move(1, BYTES, stream=1), Move(2, SEALED)]
    keys, pages = storage.read_keys(moves), Pages(storage)
    for i, byte_slot, stream in ((0, 1, 0), (2, 0, 1)):
        for head in range(HEADS):
            want = f16(pages.widened("k", stream, head, byte_slot)).astype(np.float32)
            np.testing.assert_array_equal(keys[i, :, head], want)
    keys = (keys * 1.7 + 0.3).astype(np.float32)
    keys[0, 20, 1, 3], keys[2, 7, 0, 5], keys[2, 8, 1, 6] = np.inf, np.nan, -1e9
    storage.write_keys(moves, keys)
    after = storage.byte_blocks()
    for i, byte_slot, stream in ((0, 1, 0), (2, 0, 1)):
        for head in range(HEADS):
            codes, param, _ = reference.shrink(finite(keys[i, :, head]), moves[i].valid, True)
            block = after[stream, head, byte_slot]
            got = storage.byte_part(block, "k")
            np.testing.assert_array_equal(got[0], codes)
            np.testing.assert_array_equal(got[1], param)
            values = PAGE * d + 4 * d
            np.testing.assert_array_equal(block[values:], before[stream, head, byte_slot, values:])
    np.testing.assert_array_equal(after[1, :, 1], before[1, :, 1])
    np.testing.assert_array_equal(storage.rows()[0][0, :, 1], finite(keys[1]).transpose(1, 0, 2))
    np.testing.assert_array_equal(storage.rows()[1], rows[1])
    np.testing.assert_array_equal(storage.pages()[:, :, :2], blocks[:, :, :2])


# ---- attend ----


@pytest.mark.parametrize("name", ["decode", "wide", "solo", "general", "latent"])
@pytest.mark.parametrize("n_rep", [1, 4, 9])
def test_bytes_are_read_as_exactly_as_rows(on: Device, name: str, n_rep: int) -> None:
    """Of bytes that stand for F16 numbers, nothing is rounded: the rows give the same bits."""
    layer, d, e, latent = {
        "decode": (PLAIN, 128, 128, 0),
        "wide": (Layer(Side(3, 64), Side(3, 0)), 96, 80, 0),
        "solo": (PLAIN, 256, 256, 0),
        "general": (Layer(Side(0, 64), Side(0, 0)), 64, 80, 0),
        "latent": (PLAIN, 80, 16, 64),
    }[name]
    rng = np.random.default_rng(d)
    storage = Storage(on, layer, random_rows(rng, 1, HEADS, 3, d, e), 3, n_bytes=3, latent=latent)
    blocks = storage.byte_blocks()
    for block in blocks.reshape(-1, blocks.shape[-1]):
        for part in "kv":
            codes, param = storage.byte_part(block, part)
            codes[:] = rng.integers(-127, 128, codes.shape)
            param[0] = 2.0 ** rng.integers(-8, -5, param.shape[1])
            param[1] = param[0] * rng.integers(-1900, 1900, param.shape[1])  # with the bytes, below 2^11
    storage.set_byte_blocks(blocks)
    storage.update(unseals=[Move(i, i, small=BYTES - i) for i in range(3)])
    pages = Pages(storage)
    for part, rows in zip("kv", storage.rows(), strict=True):
        np.testing.assert_array_equal(
            rows[0, 0, 2], reference.widen(*storage.byte_part(blocks[0, 0, 2], part), part == "k")
        )
    n_tokens = 1 if name == "solo" else 3
    mask = np.where(rng.random((1, n_tokens, 3 * PAGE)) < 0.3, -np.inf, 0).astype(np.float16)
    q = rng.standard_normal((1, n_tokens, HEADS * n_rep, d), np.float32)
    outs = [
        storage.attend(q, table, mask, scale=d**-0.5, n_parts=2)
        for table in ([[0, 1, 2]], [[BYTES, BYTES - 1, BYTES - 2]], [[BYTES, 1, BYTES - 2]])
    ]
    for out in outs[1:]:
        np.testing.assert_array_equal(out, outs[0])
    keys, values = (pages.stored(part, [[0, 1, 2]]) for part in "kv")
    right = attention(q, [[0, 1, 2]], mask, keys, values, scale=d**-0.5)
    assert np.abs(outs[0] - right).max() <= 1e-2 * np.abs(right).max()


def test_parameters_of_tokens_that_nobody_sees_may_be_anything(on: Device) -> None:
    """In the bytes of a CPU: what is stored on a GPU is finite."""
    storage = Storage(on, PLAIN, random_rows(np.random.default_rng(3), 1, HEADS, 1, 64), 1, n_bytes=1)
    storage.update([Move(0, 0, small=BYTES)])
    mask = np.zeros((1, 1, PAGE), np.float16)
    mask[..., 10:50] = -np.inf
    q = np.random.default_rng(4).standard_normal((1, 1, 4, 64), np.float32)
    before = storage.attend(q, [[BYTES]], mask, scale=0.125)
    if on.kernels != "cuda":
        blocks = storage.byte_blocks()
        for head in range(HEADS):
            storage.byte_part(blocks[0, head, 0], "v")[1][:, 10:50] = np.array([np.inf, np.nan])[:, None]
        storage.set_byte_blocks(blocks)
    np.testing.assert_array_equal(storage.attend(q, [[BYTES]], mask, scale=0.125), before)
