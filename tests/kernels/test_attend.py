"""The verb attend on every device against attention in double precision, over pages of random codes."""

from __future__ import annotations

import numpy as np
import pytest

from support import specification
from support.devices import Device, device
from support.pages_of_codes import CASES, Case, Content, made, random_rows, tolerance
from support.specification import Pages
from support.storage import SEALED, Storage
from xquant_gguf import codec
from xquant_gguf.plan import PAGE, Layer
from xquant_gguf.reference import hadamard


@pytest.mark.parametrize("name", CASES)
def test_attention_is_that_of_double_precision(on: Device, name: str) -> None:
    case, m = CASES[name], made(name)
    storage = m.put(on)
    kernel = on.attend_kernel(storage.c)
    assert kernel == (case.cuda or kernel) if on.kernels == "cuda" else kernel == on.kernels
    bound = tolerance(kernel, case.table) * np.abs(m.right).max()
    for n_parts in (1, 3, len(case.table)):
        assert np.abs(m.attend(storage, n_parts) - m.right).max() <= bound


@pytest.mark.skipif("avxvnni" not in codec.kernel_sets(), reason="needs AVX-VNNI")
@pytest.mark.parametrize("name", CASES)
def test_sums_of_avx_vnni_are_those_of_avx2(name: str) -> None:
    """Of integers, which nothing rounds."""
    m = made(name)
    one, other = (m.attend(m.put(device(f"cpu-{kernels}")), 2) for kernels in ("avx2", "avxvnni"))
    np.testing.assert_array_equal(one, other)


@pytest.mark.cuda
@pytest.mark.parametrize("name", CASES)
def test_queries_that_are_still_to_be_rotated(name: str) -> None:
    """By a matrix that is its own inverse: queries that were rotated come back."""
    m, storage = made(name), made(name).put(device("cuda"))
    rotated = hadamard(m.q.reshape(-1, m.q.shape[-1]).T).T.reshape(m.q.shape)
    bound = tolerance(storage.device.attend_kernel(storage.c), m.case.table) * np.abs(m.right).max()
    for n_parts in (1, 3):
        out = m.attend(storage, n_parts, q=np.ascontiguousarray(rotated), rotate=True)
        assert np.abs(out - m.right).max() <= bound


@pytest.mark.parametrize(
    "name", ["default", "two streams, groups, sinks", "mapped", "three groups of rows", "default, bytes"]
)
def test_the_number_of_threads_changes_no_bit(on: Device, name: str) -> None:
    """Parts are merged in their order, whoever is the last to come."""
    m = made(name)
    storage = m.put(on)
    for n_parts in (1, 2, 4):
        one = m.attend(storage, n_parts, n_threads=1)
        for n_threads in (2, 3, 8):
            np.testing.assert_array_equal(m.attend(storage, n_parts, n_threads), one)


@pytest.mark.parametrize(
    "name",
    [
        "default", "k4 v4", "f16 values, not rotated", "keys that come rotated", "head 80", "head 256",
        "open only", "open only, odd rows",
        "head 512, open only", "three groups of rows", "two widths", "latent and own", "mapped", "means",
    ],
)  # fmt: skip
def test_pages_of_the_stage_are_read_as_open_ones(on: Device, name: str) -> None:
    """Which no stream has."""
    m = made(name)
    rows = tuple(np.repeat(x[1:], 2, 0) for x in m.own.rows)  # both streams have those of the second
    n_slots = rows[0].shape[2]
    for staged in range(n_slots):
        own = Content(m.own.layer, (rows[0], rows[1]), m.own.pages, m.own.latent, first_block=m.own.first_block)
        reads = {"source": m.source.put(on, m.n_pages) if m.source else None, "map_": m.map}
        storage = own.put(on, m.n_pages, staged=staged, **reads)
        out = m.attend(storage, 2), *(storage.unpack(m.table, is_k) for is_k in (True, storage.stored_e == 0))
        if staged == 0:
            right = out
        for got, want in zip(out, right, strict=True):
            np.testing.assert_array_equal(got, want)
    assert n_slots > 1 or name == "three groups of rows"


@pytest.mark.parametrize("d", [64, 96, 128, 256])
def test_rows_of_the_stage_that_nobody_wrote_do_no_harm(on: Device, d: int) -> None:
    """A stage is memory of a graph, in which anything may lie; those rows are masked."""
    case, rng, n = Case(d=d), np.random.default_rng(5), 40
    rows = random_rows(rng, 1, 2, 2, d)
    storage = Storage(on, Layer(case.k, case.v), rows, 2, staged=1)
    storage.stage.set(np.full(storage.stage.bytes, 0xFF, np.uint8))  # not-a-numbers
    new = tuple(rng.standard_normal((n, 2, d), np.float32) for _ in "kv")
    assert storage.write(np.arange(PAGE, PAGE + n, dtype=np.int32), (new[0], new[1])) == 0
    q = rng.standard_normal((1, 9, 4, d), np.float32)
    mask = np.zeros((1, 9, 2 * PAGE), np.float16)
    mask[..., PAGE + n :] = -np.inf
    out = storage.attend(q, [[0, 1]], mask, scale=0.125)
    keys, values = (
        np.concatenate([x[0, :, 0], y.transpose(1, 0, 2).astype(np.float16)], 1) for x, y in zip(rows, new, strict=True)
    )
    padded = [np.pad(x, ((0, 0), (0, PAGE - n), (0, 0)))[None] for x in (keys, values)]
    right = specification.attention(q, [[0, 1]], mask, padded[0], padded[1], scale=0.125)
    assert np.abs(out - right).max() <= tolerance(on.attend_kernel(storage.c), [0, 1]) * np.abs(right).max()


def test_more_parts_than_pages(on: Device) -> None:
    """Parts without a page say nothing."""
    m = made("default")
    storage = m.put(on)
    bound = tolerance(on.attend_kernel(storage.c), m.table[0]) * np.abs(m.right).max()
    assert np.abs(m.attend(storage, 20) - m.right).max() <= bound


@pytest.mark.parametrize("v_bits", [2, 4])
def test_what_is_masked_may_be_anything(on: Device, v_bits: int) -> None:
    """In the open pages of a CPU: what is stored on a GPU is finite."""
    case = Case(v=CASES["k4 v4"].v if v_bits == 4 else CASES["default"].v, n_tokens=5)
    rng, table = np.random.default_rng(4), [[0, SEALED, 1]]
    rows = random_rows(rng, 1, 2, 2, 64)
    content = Content(Layer(case.k, case.v), rows)
    storage = content.put(on, 3)
    q = rng.standard_normal((1, 5, 4, 64), np.float32)
    mask = np.zeros((1, 5, 3 * PAGE), np.float16)
    mask[..., 10:50] = mask[..., 2 * PAGE + 100 :] = -np.inf
    keys, values = (Pages(storage).stored(name, table) for name in "kv")
    right = specification.attention(q, table, mask, keys, values, scale=0.125)
    if on.kernels != "cuda":
        for x in rows:
            x[:, :, 0, 10:50], x[:, :, 1, 100:] = np.nan, np.inf
        storage.set_rows(rows)
    out = storage.attend(q, table, mask, scale=0.125, n_parts=2)
    assert np.abs(out - right).max() <= tolerance(on.attend_kernel(storage.c), table[0]) * np.abs(right).max()


def test_a_token_that_sees_nothing_gives_zeros(on: Device) -> None:
    m = made("default")
    storage = m.put(on)
    q = np.repeat(m.q, 3, 1)
    mask = np.repeat(m.mask, 3, 1) if m.mask is not None else None
    assert mask is not None
    mask[:, 1] = -np.inf
    for n_parts in (1, 2):
        out = storage.attend(q, m.table, mask, first_stream=1, scale=m.scale, n_parts=n_parts)
        assert (out[:, 1] == 0).all()
        assert np.isfinite(out).all()
        assert (out[:, 0] != 0).any()
    sinks = np.zeros(q.shape[2], np.float32)
    assert (storage.attend(q, m.table, mask, first_stream=1, scale=m.scale, sinks=sinks)[:, 1] == 0).all()


def test_one_token_with_half_of_the_weight(on: Device) -> None:
    """The others share the rest: the hard case of one scale for a page of p."""
    case, table = CASES["default"], [[SEALED] * 8]
    rng = np.random.default_rng(9)
    storage = Content(Layer(case.k, case.v), random_rows(rng, 1, 1, 1, 64)).put(on, 8)
    keys, values = (Pages(storage).stored(name, table) for name in "kv")
    peaks = keys[0, :, 300] / np.linalg.norm(keys[0, :, 300], axis=1, keepdims=True) * 24
    q = np.repeat(peaks, 2, 0)[None, None].astype(np.float32)
    right = specification.attention(q, table, None, keys, values, scale=0.125)
    out = storage.attend(q, table, scale=0.125, n_parts=2)
    assert np.linalg.norm(out - right) <= 0.02 * np.linalg.norm(right)


@pytest.mark.arm
@pytest.mark.parametrize("name", CASES)
def test_the_instructions_of_arm_give_the_same_sums(name: str) -> None:
    """smlal, sdot and smmla add whole numbers: nothing differs."""
    m = made(name)
    outs = [m.attend(m.put(device(f"arm-{kernels}"))) for kernels in ("neon", "neon-dotprod", "neon-i8mm")]
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])
