"""The verbs unpack, read_keys and write_keys on every device, against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from support.devices import Device
from support.pages_of_codes import CASES, V, made, random_rows
from support.specification import Pages, finite
from support.storage import NONE, SEALED, Move, Storage
from xquant_gguf import reference
from xquant_gguf.plan import PAGE, Layer, Side

UNPACKED = [
    *("default", "paper", "means", "borrowed", "head 80", "two widths", "two streams", "mapped", "mapped, two streams"),
    *("head 16", "head 512", "log8 keys", "k1 v3", "mapped, nothing left over"),
]


def f16(x: NDArray[Any]) -> NDArray[np.float16]:
    return np.clip(x, -65504, 65504).astype(np.float16)


@pytest.mark.parametrize("name", UNPACKED)
def test_unpacked_pages(coder: Device, name: str) -> None:
    m = made(name)
    storage = m.put(coder)
    pages = Pages(storage)
    for part in "kv":
        want = f16(pages.stored(part, m.table, 1))
        np.testing.assert_array_equal(storage.unpack(m.table, part == "k", first_stream=1), want)
        last = slice(CASES[name].heads - 1, None)
        np.testing.assert_array_equal(storage.unpack(m.table, part == "k", last, first_stream=1), want[:, last])


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(("d", "v"), [(16, V), (128, replace(V, bits=1)), (80, Side(3, 0, "clip", "f16", True)),
                                      (512, Side(4, 0, "lloyd", "log8", True))], ids=str)  # fmt: skip
def test_sealed_pages_of_all_widths(coder: Device, bits: int, d: int, v: Side) -> None:
    """What update sealed, also at the edges of tiles."""
    rng = np.random.default_rng(d + bits)
    layer = Layer(Side(bits, (32, 64, 128)[bits % 3], param="f16" if bits % 2 == 0 else "log8"), v)
    storage = Storage(coder, layer, random_rows(rng, 1, 2, 1, d), 2)
    storage.update([Move(1, 0)])
    pages = Pages(storage)
    for name in "kv":
        want = f16(pages.stored(name, [[0, SEALED]]))
        np.testing.assert_array_equal(storage.unpack([[0, SEALED]], name == "k"), want)
        np.testing.assert_array_equal(storage.unpack([[0, SEALED]], name == "k", slice(1, 2)), want[:, 1:])


def test_every_half_survives(coder: Device) -> None:
    """All finite F16 numbers, as the means that 0 bits keep, through F32 and back."""
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    rows = halves[np.isfinite(halves)].reshape(-1, 512)
    storage = Storage(coder, Layer(Side(0, 128), V), random_rows(np.random.default_rng(0), 1, 1, 1, 512, 16), len(rows))
    pages = storage.pages()
    pages[0, 0, :, storage.part_at("k")[1]] = rows.view(np.uint8)
    storage.set_pages(pages)
    out = storage.unpack([[SEALED] * len(rows)], True).reshape(len(rows), PAGE, 512)
    for token in (0, 77, 127):
        np.testing.assert_array_equal(out[:, token].view(np.uint16), rows.view(np.uint16))


def test_every_log8_parameter(coder: Device) -> None:
    """e and q of all values, one pair a channel."""
    side = Side(1, 128, "minmax", "log8")
    e, q = np.meshgrid(np.arange(1, 256), np.arange(-127, 128, 2))
    pairs = np.stack([e.ravel(), q.ravel()]).astype(np.uint8)
    pairs = pairs[:, : pairs.shape[1] // 512 * 512].reshape(2, -1, 512).transpose(1, 0, 2)
    storage = Storage(coder, Layer(side, V), random_rows(np.random.default_rng(0), 1, 1, 1, 512, 16), len(pairs))
    pages = storage.pages()
    at = storage.part_at("k")
    pages[0, 0, :, at[0]] = np.frombuffer(np.random.default_rng(0).bytes(at[0].stop), np.uint8)
    pages[0, 0, :, at[1]] = pairs.reshape(len(pairs), -1)
    storage.set_pages(pages)
    out = storage.unpack([[SEALED] * len(pairs)], True).reshape(len(pairs), PAGE, 512)
    want = f16(Pages(storage).stored("k", [[SEALED] * len(pairs)])).reshape(out.shape)
    np.testing.assert_array_equal(out.view(np.uint16), want.view(np.uint16))


# ---- both ends of a context shift ----


@pytest.mark.parametrize("k", [Side(4, 128), Side(3, 32, "clip", "log8"), Side(0, 64)], ids=str)
@pytest.mark.parametrize("d", [64, 80, 512])
def test_keys_are_read_and_written_again_for_a_shift(coder: Device, k: Side, d: int) -> None:
    rng = np.random.default_rng(d)
    storage = Storage(coder, Layer(k, V), random_rows(rng, 2, 2, 2, d, 64), 4)
    storage.update([Move(3, 1), Move(2, 0), Move(1, 0, stream=1)])
    valid = rng.random(PAGE) < 0.5
    valid[17] = True
    moves = [Move(3, SEALED, valid), Move(0, 1), Move(1, SEALED, stream=1)]
    table = [[1, NONE, SEALED, SEALED], [NONE, SEALED, NONE, NONE]]
    unpacked = storage.unpack(table, True).reshape(2, 2, 4, PAGE, d)
    before, v_before = storage.pages(), storage.rows()[1]
    keys = storage.read_keys(moves)
    for got, (stream, page) in zip(keys, ((0, 3), (0, 0), (1, 1)), strict=True):
        np.testing.assert_array_equal(got.transpose(1, 0, 2), unpacked[stream, :, page].astype(np.float32))
    keys = (keys * 1.7 + 0.3).astype(np.float32)
    keys[0, 20, 1, 3], keys[1, 7, 0, 5], keys[1, 8, 1, 6], keys[2, 9, 0, 7] = np.inf, np.nan, -1e9, -np.inf
    storage.write_keys(moves, keys)
    np.testing.assert_array_equal(storage.rows()[0][0, :, 1], finite(keys[1]).transpose(1, 0, 2))
    np.testing.assert_array_equal(storage.rows()[1], v_before)
    pages, after = Pages(storage), storage.pages()
    for head in range(2):
        for i, (stream, page) in ((0, (0, 3)), (2, (1, 1))):
            codes, param, _ = reference.seal_k(k, finite(keys[i, :, head]), moves[i].valid)
            got = pages.parts(storage, "k", stream, head, page)
            assert got == (codes if k.bits else got[0], param)
    values = storage.layout.v_codes
    np.testing.assert_array_equal(after[..., values:], before[..., values:])
    np.testing.assert_array_equal(after[0, :, 2], before[0, :, 2])


@pytest.mark.parametrize(
    ("k", "least", "most"),
    [(Side(2, 128, "clip"), 0.7, 1.1), (Side(3, 64, "lloyd", "log8", eta=0.06), 0.95, 1.15), (Side(4, 128), 1.0, 1.15)],
    ids=str,
)
def test_many_shifts_neither_shorten_keys_nor_lengthen_them(coder: Device, k: Side, least: float, most: float) -> None:
    """Squared length of what is read after eight shifts: least error alone would leave 0.5 of it with 2 bits."""
    rng, page = np.random.default_rng(6), [Move(0, SEALED)]
    storage = Storage(coder, Layer(k, V), random_rows(rng, 1, 2, 1, 64), 1)
    storage.update([Move(0, 0)])
    turn = np.linalg.qr(rng.standard_normal((64, 64)))[0].astype(np.float32)
    once = storage.read_keys(page)
    for _ in range(8):
        storage.write_keys(page, storage.read_keys(page) @ turn)
    assert least < float((storage.read_keys(page) ** 2).sum() / (once**2).sum()) < most


def test_keys_with_borrowed_codes_keep_them(coder: Device) -> None:
    """Parameters are fitted to the owner's codes again, which nobody changes."""
    rng, k = np.random.default_rng(5), Side(2, 64, "lsq", owner=0)
    rows = random_rows(rng, 1, 2, 1, 64)
    owner = Storage(coder, Layer(Side(2, 64), V), rows, 1)
    storage = Storage(coder, Layer(k, V), rows, 1, owner=owner)
    owner.update([Move(0, 0)])
    storage.update([Move(0, 0)])
    before = owner.pages()
    keys = storage.read_keys([Move(0, SEALED)]) * np.float32(-0.5)
    storage.write_keys([Move(0, SEALED)], keys)
    np.testing.assert_array_equal(owner.pages(), before)
    for head in range(2):
        codes, param = Pages(storage).parts(storage, "k", 0, head, 0)
        assert param == reference.seal_k(k, finite(keys[0, :, head]), np.ones(PAGE, bool), codes)[1]
