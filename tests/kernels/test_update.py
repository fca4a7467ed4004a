"""The verb update on every device: pages byte for byte as the reference seals them, rows, and what is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from support.codec_rows import GOLDEN, KINDS, made_rows
from support.devices import Device, device
from support.pages_of_codes import V, random_rows
from support.specification import Pages, finite
from support.storage import ALL, NONE, SEALED, Halves, Move, Storage
from xquant_gguf import reference
from xquant_gguf.plan import PAGE, Layer, Side

HEADS = 2
Stored = dict[str, tuple[bytes, bytes]]


def outlying_rows(rng: np.random.Generator, n_streams: int, slots: int, d: int, e: int) -> tuple[Halves, Halves]:
    """Keys with constant parts and outliers, values without."""
    k, v = random_rows(rng, n_streams, HEADS, slots, d, e)
    return (k * rng.lognormal(0, 0.7, d) + 3 * rng.standard_normal(d)).astype(np.float16), v


def valid_tokens(rng: np.random.Generator) -> NDArray[np.bool_]:
    valid = rng.random(PAGE) < 0.5
    valid[rng.integers(PAGE)] = True
    return valid


def sides() -> list[Layer]:
    """Keys and values of all bits, fits and parameters."""
    out: list[Layer] = []
    for bits in range(5):
        for fit in ("paper", "minmax", "clip", "lloyd"):
            for param in ("f16",) if bits == 0 else ("f16", "log8"):
                k = Side(bits, (32, 64, 128)[len(out) % 3], fit, param, eta=0.05)
                out.append(Layer(k, Side(bits, (0, 32)[len(out) % 2], fit, param, len(out) % 3 > 0, eta=0.05)))
    return out


def sealed(layer: Layer, rows: tuple[Halves, Halves], move: Move, head: int) -> tuple[Stored, int]:
    """Codes and parameters of a page by the reference, and how many inputs were not finite."""
    out: Stored = {}
    n_bad = 0
    for name, side, x in (("k", layer.k, rows[0]), ("v", layer.v, rows[1])):
        seal: Callable[..., tuple[bytes, bytes, int]] = getattr(reference, f"seal_{name}")
        codes, param, bad = seal(side, x[move.stream, head, move.slot], move.valid)
        out[name] = codes, param
        n_bad += bad
    return out, n_bad


def check_page(storage: Storage, move: Move, head: int, right: Stored) -> None:
    pages = Pages(storage)
    for name, (codes, param) in right.items():
        got = pages.parts(storage, name, move.stream, head, move.page)
        assert got == (codes if getattr(storage.layer, name).bits else got[0], param), f"{name} of {move}"


@cache
def sealing(number: int, d: int, e: int) -> tuple[Layer, tuple[Halves, Halves], list[Move], list[list[Stored]], int]:
    """A layer, its rows, moves, what they store for each head, and how many inputs are not finite."""
    layer, rng = sides()[number], np.random.default_rng(d + e)
    rows = outlying_rows(rng, 2, 3, d, e)
    rows[0][:, :, 1, 5, 3], rows[1][:, :, 1, 7, 2] = np.inf, np.nan
    rows[0][:, :, 2], rows[1][:, :, 2] = 0.25, 0.0  # constant groups
    moves = [Move(3, 0), Move(0, 1, valid_tokens(rng)), Move(4, 2, valid_tokens(rng), 1)]
    both = [[sealed(layer, rows, move, head) for head in range(HEADS)] for move in moves]
    return layer, rows, moves, [[x[0] for x in heads] for heads in both], sum(x[1] for heads in both for x in heads)


@pytest.mark.parametrize("number", range(len(sides())), ids=lambda n: str(sides()[n].k.fit + str(sides()[n].k.bits)))
@pytest.mark.parametrize(("d", "e"), [(64, 128), (80, 96)])
def test_sealed_pages_are_the_reference_byte_for_byte(coder: Device, number: int, d: int, e: int) -> None:
    layer, rows, moves, right, n_bad = sealing(number, d, e)
    storage = Storage(coder, layer, rows, 5)
    before = storage.pages()
    assert storage.update(moves, n_threads=3) == n_bad
    for move, heads in zip(moves, right, strict=True):
        for head in range(HEADS):
            check_page(storage, move, head, heads[head])
    untouched = np.ones((2, HEADS, 5), bool)
    for move in moves:
        untouched[move.stream, :, move.page] = False
    np.testing.assert_array_equal(storage.pages()[untouched], before[untouched])


TRAPPED = (
    Layer(Side(4, 128, "minmax", "log8"), Side(3, 0, "lloyd", "f16", True)),
    Layer(Side(1, 32, "clip"), Side(2, 32, "paper", "log8", eta=0.045)),
    Layer(Side(3, 64, "lloyd", "log8"), Side(1, 0, "clip", "log8", True)),
    Layer(Side(0, 64), Side(0, 0)),
)


@pytest.mark.parametrize("layer", TRAPPED, ids=str)
def test_rows_that_are_traps(coder: Device, layer: Layer) -> None:
    """Constant channels, outliers, zeros, numbers too small or nearly too large for F16: the reference's bytes."""
    d, e = 80, 96
    rows = tuple(np.stack([made_rows(kind, n, i) for i, kind in enumerate(KINDS)])[None, None] for n in (d, e))
    storage = Storage(coder, layer, (rows[0], rows[1]), len(KINDS))
    moves = [Move(len(KINDS) - 1 - slot, slot) for slot in range(len(KINDS))]
    assert storage.update(moves, n_threads=3) == 0
    for move in moves:
        check_page(storage, move, 0, sealed(layer, (rows[0], rows[1]), move, 0)[0])


def test_golden_vectors(coder: Device) -> None:
    """Pages that an earlier version sealed."""
    for case in json.loads(GOLDEN.read_text()):
        rows = np.frombuffer(bytes.fromhex(case["rows"]), np.float16).reshape(1, 1, 1, PAGE, -1)
        side, name, width = Side(**case["side"]), case["name"], rows.shape[-1]
        other = Side(0, 128)
        plain = Side(side.bits, side.group, rotate=side.rotate)
        layers = [Layer(s, other) if name == "k" else Layer(other, s) for s in (side, plain)]
        both = (rows, rows)
        owner = None
        if case["owner_codes"] is not None:
            owner = Storage(coder, layers[1], both, 1)
            pages = owner.pages()
            pages[0, 0, 0, owner.part_at(name)[0]] = np.frombuffer(bytes.fromhex(case["owner_codes"]), np.uint8)
            owner.set_pages(pages)
        storage = Storage(coder, layers[0], both, 1, owner=owner)
        storage.update([Move(0, 0)])
        codes, param = Pages(storage).parts(storage, name, 0, 0, 0)
        assert case["owner_codes"] is not None or codes == bytes.fromhex(case["codes"]), f"{name} {side} {width}"
        assert param == bytes.fromhex(case["param"]), f"{name} {side} {width}"


# ---- codes and values of other layers ----


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("fit", ["paper", "minmax", "lsq"])
def test_borrowed_codes_are_only_read(coder: Device, bits: int, fit: str) -> None:
    rng = np.random.default_rng(bits)
    own = Layer(Side(bits, 128), Side(bits, 0, "minmax", "f16", True))
    borrowed = Layer(Side(bits, 128, fit, owner=0, eta=0.1), Side(bits, 0, fit, "f16", True, 0, 0.1))
    rows = [outlying_rows(rng, 1, 1, 64, 64) for _ in range(2)]
    owner = Storage(coder, own, rows[0], 2)
    reader = Storage(coder, borrowed, rows[1], 2, owner=owner)
    move = Move(1, 0, valid_tokens(rng))
    owner.update([move])
    before = owner.pages()
    reader.update([move])
    np.testing.assert_array_equal(owner.pages(), before)
    for head in range(HEADS):
        for name, x in zip("kv", rows[1], strict=True):
            codes, param = Pages(reader).parts(reader, name, 0, head, 1)
            seal = getattr(reference, f"seal_{name}")
            assert param == seal(getattr(borrowed, name), x[0, head, 0], move.valid, codes)[1]


def mapped(on: Device, e: int, bits: int, large: float = 0.0) -> tuple[Storage, list[tuple[Halves, Halves]]]:
    """A layer whose values another predicts, page 1 of both sealed from slot 0; and the rows of the source and its own.

    large: a tenth of its map."""
    rng = np.random.default_rng(bits)
    side = Side(bits, 0, "lloyd" if bits else "minmax", "log8" if bits else "f16", True, source=0, eta=0.1)
    heads = np.array([1, 0], np.int32)
    map_ = (rng.standard_normal((HEADS, e, e)) / e**0.5).astype(np.float32)
    if large:
        map_[rng.random(map_.shape) < 0.1] = large
    rows = [outlying_rows(rng, 1, 1, e, e) for _ in range(2)]
    source = Storage(on, Layer(Side(4, 128), V), rows[0], 2)
    reader = Storage(on, Layer(Side(4, 128), side), rows[1], 2, source=source, map_=(heads, map_))
    for layer in (source, reader):
        layer.update([Move(1, 0)])
    return reader, rows


def check_mapped(reader: Storage, rows: list[tuple[Halves, Halves]]) -> float:
    """Page 1 of the reader is the reference's byte for byte; returns the largest prediction."""
    assert reader.map is not None
    assert reader.source is not None
    heads, map_ = reader.map
    largest = 0.0
    for head in range(HEADS):
        stored = reference.seal_v(reader.source.layer.v, rows[0][1][0, heads[head], 0], ALL)[:2]
        predicted = reference.predict_v(reader.source.layer.v, reader.e, *stored, map_[head])
        codes, param, _ = reference.seal_v(reader.layer.v, rows[1][1][0, head, 0], ALL, None, predicted)
        check_page(reader, Move(1, 0), head, {"v": (codes, param)})
        largest = max(largest, float(np.abs(predicted).max()))
    return largest


@pytest.mark.parametrize("bits", [0, 1, 2])
@pytest.mark.parametrize("e", [64, 128, 512])
def test_mapped_values(coder: Device, bits: int, e: int) -> None:
    check_mapped(*mapped(coder, e, bits))


@pytest.mark.parametrize("bits", [0, 2])
@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
def test_predictions_that_are_not_finite_are_clamped(coder: Device, bits: int) -> None:
    """Products overflow, and infinities of both signs make not-a-numbers."""
    reader, rows = mapped(coder, 64, bits, 3e38)
    assert check_mapped(reader, rows) == 65504
    want = np.clip(Pages(reader).stored("v", [[NONE, SEALED]]), -65504, 65504).astype(np.float16)
    np.testing.assert_array_equal(reader.unpack([[NONE, SEALED]], False), want)


# ---- open pages ----


def test_pages_are_opened_again(coder: Device) -> None:
    rng = np.random.default_rng(1)
    rows = outlying_rows(rng, 2, 3, 64, 128)
    storage = Storage(coder, Layer(Side(3, 64), V), rows, 4)
    assert storage.update([Move(2, 1), Move(0, 0, stream=1)]) == 0
    storage.update(unseals=[Move(2, 0), Move(0, 2, stream=1)], n_threads=3)
    pages = Pages(storage)
    for name, got, before in zip("kv", storage.rows(), rows, strict=True):
        want = before.copy()
        for head in range(HEADS):
            want[0, head, 0] = pages.rows(name, 0, head, 2).astype(np.float16)
            want[1, head, 2] = pages.rows(name, 1, head, 0).astype(np.float16)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("d", [80, 576])
def test_a_latent_layer_seals_and_writes_keys_alone(coder: Device, d: int) -> None:
    rng = np.random.default_rng(d)
    layer, rows = Layer(Side(4, 64), V), (outlying_rows(rng, 2, 3, d, 16)[0], random_rows(rng, 2, HEADS, 3, 0)[1])
    storage = Storage(coder, layer, rows, 4, latent=64)
    moves = [Move(2, 1, valid_tokens(rng)), Move(0, 0, stream=1)]
    storage.update(moves)
    for move in moves:
        for head in range(HEADS):
            codes, param, _ = reference.seal_k(layer.k, rows[0][move.stream, head, move.slot], move.valid)
            assert Pages(storage).parts(storage, "k", move.stream, head, move.page) == (codes, param)
    assert storage.layout.v_codes == storage.layout.v_param == -1
    new = rng.standard_normal((2, HEADS, d), dtype=np.float32)
    storage.write(np.array([5, PAGE + 3], np.int32), (new, new))
    storage.update(unseals=[Move(2, 2)], n_threads=3)
    want, pages = rows[0].copy(), Pages(storage)
    want[0, :, 0, 5], want[0, :, 1, 3] = finite(new[0]), finite(new[1])
    for head in range(HEADS):
        want[0, head, 2] = pages.rows("k", 0, head, 2).astype(np.float16)
    np.testing.assert_array_equal(storage.rows()[0], want)


@pytest.mark.parametrize("n_threads", [1, 3])
def test_rows_are_stored_finite_and_counted_once(coder: Device, n_threads: int) -> None:
    rng = np.random.default_rng(2)
    rows = outlying_rows(rng, 2, 3, 64, 128)
    storage = Storage(coder, Layer(Side(3, 64), V), rows, 4)
    at = np.array([PAGE + 3, 2 * PAGE + 100, 5, (3 + 1) * PAGE + 127], np.int32)  # the last one: of stream 1
    new = tuple(rng.standard_normal((4, HEADS, n), dtype=np.float32) for n in (64, 128))
    new[0][1, 1, 2], new[1][2, 0, 7], new[0][3, 0, 1], new[1][0, 1, 1] = np.nan, 1e9, -np.inf, 65504
    assert storage.write(at, (new[0], new[1]), n_threads) == 3
    for got, before, x in zip(storage.rows(), rows, new, strict=True):
        want = before.copy()
        flat = want.transpose(0, 2, 3, 1, 4).reshape(6 * PAGE, HEADS, -1)
        flat[at] = finite(x)
        want = flat.reshape(2, 3, PAGE, HEADS, -1).transpose(0, 3, 1, 2, 4)
        np.testing.assert_array_equal(got, want)
    assert storage.update([Move(0, 1), Move(1, 2), Move(2, 0), Move(0, 1, stream=1)]) == 0


@pytest.mark.cuda
@pytest.mark.parametrize("d", [16, 64, 80, 96, 128, 192, 256, 512, 576])
def test_keys_that_are_still_to_be_rotated(d: int) -> None:
    """In blocks of the largest power of two that divides the width; what is not finite is counted as it comes."""
    rng, n = np.random.default_rng(d), 5
    storage = Storage(device("cuda"), Layer(Side(4, 128), V), outlying_rows(rng, 1, 3, d, 64), 4)
    at = rng.permutation(3 * PAGE)[:n].astype(np.int32)
    new = rng.standard_normal((n, HEADS, d), dtype=np.float32), rng.standard_normal((n, HEADS, 64), dtype=np.float32)
    new[0][1, 1, 2], new[0][3, 0, 5] = np.inf, np.nan
    assert storage.write(at, new, rotate=True) == 2
    keys, values = (x[0].reshape(HEADS, 3 * PAGE, -1)[:, at].transpose(1, 0, 2) for x in storage.rows())
    want = reference.hadamard(finite(new[0]).astype(np.float32).reshape(-1, d).T).T.reshape(n, HEADS, d)
    np.testing.assert_allclose(keys.astype(np.float32), want, rtol=2**-10, atol=1e-3)
    np.testing.assert_array_equal(values, finite(new[1]))


@pytest.mark.parametrize("seals", [True, False])
def test_rows_of_the_stage(coder: Device, seals: bool) -> None:
    """They lie behind the slots of all streams."""
    rng = np.random.default_rng(4)
    rows = outlying_rows(rng, 2, 4, 80, 96)
    storage = Storage(coder, Layer(Side(3, 64), Side(3, 0)), rows, 5, staged=2, seals=seals)
    at = np.array([PAGE + 3, 4 * PAGE + 100, 3 * PAGE + 5, 5 * PAGE + 127], np.int32)
    new = tuple(rng.standard_normal((4, HEADS, n), dtype=np.float32) for n in (80, 96))
    assert storage.write(at, (new[0], new[1])) == 0
    for own, staged, before, x in zip(storage.rows(), storage.staged_rows(), rows, new, strict=True):
        want = before[:, :, :2].copy(), before[0, :, 2:].copy()
        want[0][0, :, 1, 3], want[0][1, :, 1, 5] = finite(x[0]), finite(x[2])
        if coder.kernels == "cuda":  # a stage has no other rows, and what it had may not be finite
            want[1][:] = 0
        want[1][:, 0, 100], want[1][:, 1, 127] = finite(x[1]), finite(x[3])
        np.testing.assert_array_equal(own, want[0])
        np.testing.assert_array_equal(staged, want[1])


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("latent", [0, 64])
def test_the_stage_is_cleared(coder: Device, n_threads: int, latent: int) -> None:
    """Pages of slots and of the stage are sealed, slots are refilled, moves without a slot move nothing."""
    rng = np.random.default_rng(6)
    rows = outlying_rows(rng, 2, 5, 80, 96)
    if latent:
        rows = rows[0], random_rows(rng, 2, HEADS, 5, 0)[1]
    layer = Layer(Side(4, 64), Side(0, 0) if latent else V)
    storage = Storage(coder, layer, rows, 5, staged=3, latent=latent)
    moves = [
        Move(3, 0, refill=3), Move(0, 1, valid_tokens(rng), 1, 4), Move(4, 2, valid_tokens(rng)), Move(0, NONE),
        Move(2, 1),
    ]  # fmt: skip
    storage.update(moves, n_threads=n_threads, serial=77)
    want = [x[:, :, :2].copy() for x in rows]
    for x, before in zip(want, rows, strict=True):
        x[0, :, 0], x[1, :, 1] = before[0, :, 3], before[0, :, 4]
    for move in [m for m in moves if m.slot != NONE]:
        of = move if move.slot < 2 else Move(move.page, move.slot, move.valid, 0)  # the stage is no stream's
        for head in range(HEADS):
            if latent:
                right: Stored = {"k": reference.seal_k(layer.k, rows[0][of.stream, head, of.slot], move.valid)[:2]}
            else:
                right = sealed(layer, rows, of, head)[0]
            check_page(storage, move, head, right)
    for own, staged, x, before in zip(storage.rows(), storage.staged_rows(), want, rows, strict=True):
        np.testing.assert_array_equal(own, x)
        np.testing.assert_array_equal(staged, before[0, :, 2:])


def test_every_half_is_rounded_as_numpy_rounds(coder: Device) -> None:
    """All F16 numbers, and F32 numbers between them: halves go to even."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    low, high = halves[:-1].astype(np.float32), halves[1:].astype(np.float32)
    x = np.concatenate([halves.astype(np.float32), (low + high) / 2, low + (high - low) * np.float32(0.51)])
    x = np.concatenate([x, -x, np.zeros(-2 * len(x) % (PAGE * 512), np.float32)]).reshape(PAGE, -1)
    slots = x.shape[1] // 512
    layer = Layer(Side(4, 128), Side(4, 0))
    empty = np.zeros((1, 1, slots, PAGE, 512), np.float16)
    storage = Storage(coder, layer, (empty, empty), slots)
    for slot in range(slots):
        new = np.ascontiguousarray(x[:, slot * 512 : (slot + 1) * 512]).reshape(PAGE, 1, 512)
        assert storage.write(np.arange(slot * PAGE, (slot + 1) * PAGE, dtype=np.int32), (new, -new)) == 0
    for got, want in zip(storage.rows(), (x, -x), strict=True):
        np.testing.assert_array_equal(got[0, 0].transpose(1, 0, 2).reshape(PAGE, -1), want.astype(np.float16))


def test_each_verb_runs_the_kernels_of_its_device(on: Device) -> None:
    rows = outlying_rows(np.random.default_rng(3), 1, 1, 64, 64)
    storage = Storage(on, Layer(Side(4, 128), V), rows, 2)
    keys, q = np.zeros((1, PAGE, HEADS, 64), np.float32), np.ones((1, 1, HEADS, 64), np.float32)
    verbs: list[Callable[[], Any]] = [
        lambda: storage.update([Move(0, 0)]),
        lambda: storage.update(unseals=[Move(0, 0)]),
        lambda: storage.write(np.zeros(1, np.int32), (q[0], q[0])),
        lambda: storage.attend(q, [[SEALED]]),
        lambda: storage.unpack([[SEALED]], True),
        lambda: storage.read_keys([Move(0, SEALED)]),
        lambda: storage.write_keys([Move(0, SEALED)], keys),
    ]
    for verb in verbs:
        verb()
        assert on.ran == ({on.kernels} - {"cuda"})
