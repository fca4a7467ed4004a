"""Attention over F16 rows (attend_rows), which prompts take on GPUs of compute capability 9.0, against numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from support import gpu, specification
from support.devices import Buffer, Refused, device
from support.gpu import Cuda
from support.specification import Doubles
from support.storage import Floats, Halves
from xquant_gguf import native
from xquant_gguf.plan import PAGE

pytestmark = pytest.mark.cuda


@pytest.fixture
def on() -> Cuda:
    if gpu.capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    cuda = device("cuda")
    assert isinstance(cuda, Cuda)
    return cuda


class Call:
    """A call of attend_rows: q [stream][token][head][d], keys and values [stream][KV head][cell][d], mask
    [stream][token][cell]."""

    def __init__(
        self, on: Cuda, q: Floats, keys: Halves, values: Halves, mask: Halves, scale: float, sinks: Floats | None = None
    ) -> None:
        ffi, _ = native.load()
        self.on, self.shape = on, q.shape
        rows = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in (keys, values)]
        self.inputs = [Buffer(on, q), *(Buffer(on, x) for x in (*rows, mask))]
        self.out, self.args = Buffer(on, q.nbytes), ffi.new("xq_rows_args *")
        a, width, n_head = self.args, q.shape[3], q.shape[2]
        a.q, a.out = self.inputs[0].pointer("float"), self.out.pointer("float")
        a.k, a.v, a.mask = (x.pointer("uint16_t") for x in self.inputs[1:])
        a.q_head_stride, a.q_token_stride, a.q_stream_stride = 4 * width, 4 * width * n_head, q[0].nbytes
        a.mask_token_stride, a.mask_stream_stride = mask[0, 0].nbytes, mask[0].nbytes
        a.width, a.n_head, a.n_head_kv, a.n_tokens, a.n_streams = width, n_head, keys.shape[1], q.shape[1], len(q)
        a.n_kv_pages, a.scale = mask.shape[2] // PAGE, scale
        if sinks is not None:
            self.inputs.append(Buffer(on, sinks))
            a.sinks = self.inputs[-1].pointer("float")
        self.scratch = Buffer(on, max(int(on.backend.rows_scratch(a)), 16))
        a.scratch = ffi.cast("void *", self.scratch.at)

    def run(self) -> Floats:
        """What comes out; nothing was written elsewhere."""
        ffi, _ = native.load()
        if self.on.backend.attend_rows(self.args, ffi.new("xq_exec *", {"nth": 1})) != 0:
            raise Refused(self.on.error())
        self.on.synchronize()
        for buffer in (*self.inputs, self.out, self.scratch):
            buffer.check()
        return self.out.get(np.float32, self.shape)


def reference(q: Floats, keys: Halves, values: Halves, mask: Halves, scale: float, sinks: Floats | None) -> Doubles:
    table = [[0] * (mask.shape[2] // PAGE)] * len(q)
    k, v = (np.nan_to_num(x).astype(np.float32) for x in (keys, values))
    return specification.attention(q, table, mask, k, v, scale=scale, sinks=sinks)


def random_mask(rng: np.random.Generator, n_streams: int, n_tokens: int, n_pages: int) -> Halves:
    """Of four pages: seen by nobody, by all, in part, and in part with numbers added; a token in five sees nothing."""
    mask = np.zeros((n_streams, n_tokens, n_pages, PAGE), np.float16)
    mask[rng.random(mask.shape) < 0.3] = -np.inf
    mask[:, :, 3::4] += rng.standard_normal(mask[:, :, 3::4].shape).astype(np.float16)
    mask[:, :, 0::4], mask[:, :, 1::4] = 0, -np.inf
    mask[:, 3::5] = -np.inf
    return mask.reshape(n_streams, n_tokens, -1)


@pytest.mark.parametrize(
    ("width", "n_tokens", "n_head", "n_head_kv", "n_pages", "n_streams", "has_sinks"),
    [
        pytest.param(128, 32, 4, 1, 1, 1, False, id="one page, one tile"),
        pytest.param(128, 1, 1, 1, 2, 1, True, id="one row"),
        pytest.param(128, 100, 8, 2, 10, 2, True, id="two streams"),
        pytest.param(128, 50, 6, 2, 10, 1, False, id="a token's heads in two tiles"),
        pytest.param(128, 300, 14, 2, 24, 1, True, id="seven heads"),
        pytest.param(128, 17, 16, 2, 132, 2, True, id="many parts"),
        pytest.param(128, 600, 32, 32, 3, 1, False, id="more blocks than processors"),
        pytest.param(64, 100, 8, 2, 10, 2, True, id="64 channels"),
        pytest.param(64, 17, 64, 8, 40, 1, False, id="64 channels, parts"),
    ],
)
def test_attention_over_rows(
    on: Cuda, width: int, n_tokens: int, n_head: int, n_head_kv: int, n_pages: int, n_streams: int, has_sinks: bool
) -> None:
    """Pages that nobody sees hold no numbers: they are not read."""
    rng = np.random.default_rng(n_tokens)
    q = 2 * rng.standard_normal((n_streams, n_tokens, n_head, width), dtype=np.float32)
    shape = n_streams, n_head_kv, n_pages * PAGE, width
    keys, values = (rng.standard_normal(shape, dtype=np.float32).astype(np.float16) for _ in "kv")
    mask = random_mask(rng, n_streams, n_tokens, n_pages)
    sinks = rng.standard_normal(n_head, dtype=np.float32) if has_sinks else None
    for x in (keys, values):
        x.reshape(n_streams, n_head_kv, n_pages, PAGE, width)[:, :, 1::4] = np.nan
    call = Call(on, q, keys, values, mask, width**-0.5, sinks)
    right = reference(q, keys, values, mask, width**-0.5, sinks)
    assert on.backend.rows_scratch(call.args) >= 0
    for _ in range(3):  # what an earlier call left in scratch memory is not read
        assert np.abs(call.run() - right).max() <= 3e-3 * np.abs(right).max()
    assert (call.run()[:, 3::5] == 0).all()


def test_strides(on: Cuda) -> None:
    """Queries of some heads of more, and a mask with more tokens and cells than there are."""
    rng, n_tokens, n_pages = np.random.default_rng(5), 70, 3
    q = rng.standard_normal((1, n_tokens, 8, 128), dtype=np.float32)
    keys, values = (rng.standard_normal((1, 1, n_pages * PAGE, 128), dtype=np.float32).astype(np.float16) for _ in "kv")
    mask = random_mask(rng, 1, n_tokens + 5, n_pages + 1)
    call = Call(on, q, keys, values, mask, 0.1)
    call.args.q += 4 * 128
    call.args.n_head, call.args.n_kv_pages = 4, n_pages
    call.out, call.shape = Buffer(on, 4 * n_tokens * 4 * 128), (1, n_tokens, 4, 128)
    call.args.out = call.out.pointer("float")
    right = reference(q[:, :, 4:], keys, values, mask[:, :n_tokens, : n_pages * PAGE], 0.1, None)
    assert np.abs(call.run() - right).max() <= 3e-3 * np.abs(right).max()


def test_cells_beside_a_far_heavier_one_count(on: Cuda) -> None:
    """One cell of 38,400 has 999 times the weight of the others together, and a value of 0.  Each of those has less
    than half of what a half can tell from nothing, if the heaviest is 1."""
    n_cells, d = 300 * PAGE, 128
    q = np.ones((1, 1, 4, d), np.float32)
    keys, values = (np.zeros((1, 1, n_cells, d), np.float16) for _ in "kv")
    values[:] = np.linspace(0.5, 1.5, d)
    keys[0, 0, 7], values[0, 0, 7] = np.log(999 * n_cells) * d**-0.5, 0
    mask = np.zeros((1, 1, n_cells), np.float16)
    right = reference(q, keys, values, mask, d**-0.5, None)
    assert right.max() < 2e-3
    assert np.abs(Call(on, q, keys, values, mask, d**-0.5).run() - right).max() <= 0.02 * right.max()


def small_call(on: Cuda, width: int = 128) -> Call:
    rows = np.zeros((1, 1, PAGE, width), np.float16)
    return Call(on, np.zeros((1, 2, 4, width), np.float32), rows, rows, np.zeros((1, 2, PAGE), np.float16), 1.0)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda a: setattr(a, "width", 96), id="width"),
        pytest.param(lambda a: setattr(a, "n_head_kv", 3), id="heads"),
        pytest.param(lambda a: setattr(a, "n_tokens", 0), id="no tokens"),
        pytest.param(lambda a: setattr(a, "q_head_stride", 520), id="stride"),
        pytest.param(lambda a: setattr(a, "k", a.k + 4), id="address"),
        pytest.param(lambda a: setattr(a, "n_tokens", 1 << 30), id="grid"),
    ],
)
def test_rows_without_a_kernel(on: Cuda, change: Callable[[Any], None]) -> None:
    call = small_call(on)
    assert on.backend.rows_scratch(call.args) >= 0
    change(call.args)
    assert on.backend.rows_scratch(call.args) == -1
    with pytest.raises(Refused, match="attend_rows: this device has no kernel for these rows"):
        call.run()


@pytest.mark.parametrize("name", ["q", "k", "v", "mask", "scratch", "out"])
def test_null_pointers(on: Cuda, name: str) -> None:
    call = small_call(on)
    setattr(call.args, name, native.load()[0].NULL)
    with pytest.raises(Refused, match=f"attend_rows: {name} must not be null"):
        call.run()
