"""What the store functions and the verbs refuse: a message that names it, and nothing is changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from support import remote
from support.devices import Buffer, Cpu, Device, Refused, device
from support.pages_of_codes import V, random_rows
from support.storage import BYTES, NONE, SEALED, Move, Storage, c_layer
from xquant_gguf import native
from xquant_gguf.plan import Layer, Side

PLAIN = Layer(Side(4, 128), V)


@pytest.fixture(params=["cpu-scalar", pytest.param("cuda", marks=pytest.mark.cuda)])
def any_one(request: pytest.FixtureRequest) -> Device:
    """A device of each backend: what is refused does not depend on kernel sets."""
    return device(request.param)


def made(on: Device, layer: Layer = PLAIN, *, streams: int = 2, seals: bool = True, **reads: Any) -> Storage:
    """Two KV heads, three slots, four pages; no byte slots unless n_bytes says so."""
    n_slots = 3 + reads.get("staged", 0)
    return Storage(on, layer, random_rows(np.random.default_rng(0), streams, 2, n_slots, 64), 4, seals=seals, **reads)


class Call:
    """A good call of a verb with all of its memory; fields of its arguments and of its store can be changed."""

    def __init__(self, on: Device, verb: str, storage: Storage | None = None) -> None:
        ffi, _ = native.load()
        self.on, self.verb = on, verb
        self.storage = storage or made(on)
        self.data = Buffer(on, np.zeros(1 << 18, np.float32))
        self.words = Buffer(on, np.array([[0, 1, 2, NONE, *[-1] * 5], [1, 0, 0, NONE, *[-1] * 5]], np.int32))
        self.count = Buffer(on, np.zeros(64, np.uint64))
        self.table = Buffer(on, np.array([[0, 1, 2, -2], [-2, 1, 2, 0]], np.int32))
        keys = verb in ("read_keys", "write_keys")
        self.a = a = ffi.new(f"xq_{'keys' if keys else 'update' if verb == 'rows' else verb}_args *")
        number, words = self.data.pointer("float"), self.words.pointer("int32_t")
        if verb == "update":
            a.seals, a.n_seals, a.n_nonfinite = words, 2, self.count.pointer("uint64_t")
        elif verb == "rows":
            a.rows, a.n_tokens, a.n_nonfinite = words + 3, 0, self.count.pointer("uint64_t")
            self.rows = Buffer(on, np.array([0, 5 * 128 + 127], np.int32))
            a.rows, a.n_tokens, a.k_cur, a.v_cur = self.rows.pointer("int32_t"), 2, number, number
            a.k_head_stride = a.v_head_stride = 256
            a.k_token_stride = a.v_token_stride = 512
        elif verb == "attend":
            a.q, a.out, a.partial = number, number + (1 << 16), number + (1 << 17)
            a.q_head_stride, a.q_token_stride, a.table = 256, 1024, self.table.pointer("int32_t")
            a.n_head, a.n_tokens, a.n_streams, a.n_kv_pages, a.n_parts, a.scale = 4, 1, 2, 4, 2, 0.1
            a.arrivals = self.count.pointer("uint32_t")
        elif verb == "unpack":
            a.table, a.rows = self.table.pointer("int32_t"), self.data.pointer("uint16_t")
            a.n_streams, a.n_kv_pages, a.is_k, a.n_heads = 2, 4, 1, 2
        else:
            a.pages, a.n_pages, a.keys, a.head_stride, a.token_stride = words, 2, number, 256, 512

    def __call__(self) -> None:
        self.on.verb("update" if self.verb == "rows" else self.verb, self.storage.c, self.a)

    def memory(self) -> list[bytes]:
        return [self.on.read(buffer.at, buffer.bytes) for buffer in list(self.on.buffers)]


def refused(call: Call, message: str) -> None:
    before = call.memory()
    with pytest.raises(Refused, match=message):
        call()
    assert call.memory() == before


VERBS = ("update", "rows", "attend", "unpack", "read_keys", "write_keys")


@pytest.mark.parametrize("verb", VERBS)
def test_good_calls_are_not_refused(any_one: Device, verb: str) -> None:
    Call(any_one, verb)()


BAD = [
    *((verb, "n_pages", n, "n_pages is") for verb in ("read_keys", "write_keys") for n in (0, -1)),
    ("update", "n_seals", -1, "n_seals is -1"),
    (
        "update",
        "n_tokens",
        1,
        "n_seals is 2, n_unseals 0 and n_tokens 1; a call moves pages or writes rows, never both",
    ),
    ("rows", "n_unseals", 1, "n_seals is 0, n_unseals 1 and n_tokens 2; a call moves pages or writes rows, never both"),
    ("rows", "k_head_stride", 258, "k_head_stride is 258, must be a multiple of 4"),
    ("rows", "v_token_stride", -4, "v_token_stride is -4"),
    ("attend", "n_head", 5, "n_head is 5, must be a multiple of n_head_kv, 2"),
    ("attend", "n_head", 1, "n_head is 1"),
    ("attend", "n_tokens", 0, "n_tokens is 0"),
    ("attend", "n_tokens", 1 << 29, r"n_streams \* n_tokens \* n_head is"),
    ("attend", "n_streams", 3, "n_streams is 3, must be 1 to 2"),
    ("attend", "n_kv_pages", 5, "n_kv_pages is 5, must be 0 to 4"),
    ("attend", "n_parts", 0, "n_parts is 0"),
    ("attend", "scale", 0.0, "scale is 0, must be above 0"),
    ("attend", "scale", float("nan"), "scale is -?nan"),
    ("attend", "q_head_stride", 3, "q_head_stride is 3"),
    ("unpack", "first_head", 2, "first_head is 2, must be 0 to 1"),
    ("unpack", "n_heads", 3, "n_heads is 3, must be 1 to 2"),
    ("unpack", "is_k", 2, "is_k is 2"),
    ("unpack", "n_kv_pages", 0, "n_kv_pages is 0"),
    ("write_keys", "token_stride", 6, "token_stride is 6"),
]


@pytest.mark.parametrize(("verb", "field", "value", "message"), BAD, ids=str)
def test_counts_and_strides_out_of_range(any_one: Device, verb: str, field: str, value: Any, message: str) -> None:
    call = Call(any_one, verb)
    setattr(call.a, field, value)
    refused(call, message)


NULL = {
    "update": ("seals", "n_nonfinite"),
    "rows": ("rows", "k_cur", "v_cur", "n_nonfinite"),
    "attend": ("q", "table", "partial", "arrivals", "out"),
    "unpack": ("table", "rows"),
    "read_keys": ("pages", "keys"),
    "write_keys": ("pages", "keys"),
}


@pytest.mark.parametrize(("verb", "field"), [(verb, field) for verb, fields in NULL.items() for field in fields])
def test_null_pointers(any_one: Device, verb: str, field: str) -> None:
    call = Call(any_one, verb)
    setattr(call.a, field, native.load()[0].NULL)
    refused(call, f"{field} must not be null")


@pytest.mark.parametrize("verb", ["update", "attend", "unpack", "read_keys", "write_keys"])
def test_no_store_and_no_arguments(any_one: Device, verb: str) -> None:
    null, call = native.load()[0].NULL, Call(any_one, verb)
    with pytest.raises(Refused, match="store must not be null"):
        any_one.verb(verb, null, call.a)
    with pytest.raises(Refused, match="args must not be null"):
        any_one.verb(verb, call.storage.c, null)


STORES = [
    ("n_head_kv", 0, "n_head_kv is 0"),
    ("n_pages", 0, "n_pages is 0"),
    ("n_slots", 1 << 23, "n_slots is 8388608"),
    ("n_streams", -1, "n_streams is -1"),
    ("k.width", 72, "k.width is 72, must be a multiple of 16 from 16 to 576"),
    ("v.width", 592, "v.width is 592"),
    ("latent", 8, "latent is 8, must be a multiple of 16"),
    ("latent", 80, "latent is 80, must be 0 to 64"),
    ("latent", -16, "latent is -16, must be 0 to 64"),
    ("k.plan.bits", 5, "k: .*bits is 5, must be 0 to 4"),
    ("v.plan.group", 7, "v: .*group is 7"),
    ("n_bytes", -1, "n_bytes is -1"),
    ("n_bytes", 1, "k.bytes must not be null"),
    ("k.rows", None, "k.rows must not be null"),
    ("v.param", None, "k.param and v.param must both be there"),
    ("k.codes", None, "k.codes must not be null for 4 bits"),
    ("mapped", 1, "mapped is 1, but v.plan.source is -1"),
    ("v.plan.source", 0, "mapped is 0, but v.plan.source is 0"),
    ("n_staged", -1, "n_staged is -1, must be 0 to"),
    ("n_staged", 1, "k.stage must not be null for n_staged 1"),
    ("v.first_staged", 2, "v.first_staged is 2, must be n_slots, 3"),
]


@pytest.mark.parametrize(("field", "value", "message"), STORES, ids=str)
@pytest.mark.parametrize("verb", VERBS)
def test_stores_that_are_none(any_one: Device, verb: str, field: str, value: Any, message: str) -> None:
    call = Call(any_one, verb)
    at = call.storage.c
    *path, last = field.split(".")
    for name in path:
        at = getattr(at, name)
    setattr(at, last, native.load()[0].NULL if value is None else value)
    refused(call, message)


@pytest.mark.parametrize("verb", VERBS)
def test_bytes_that_lie_between_numbers(any_one: Device, verb: str) -> None:
    call = Call(any_one, verb, made(any_one, n_bytes=1))
    call()
    call.storage.c.v.bytes_slot += 3
    refused(call, r"v: bytes_slot is \d+, must be a multiple of 2")


def test_more_rows_than_32_bits_can_count(any_one: Device) -> None:
    call = Call(any_one, "rows")
    call.storage.c.n_streams, call.storage.c.n_slots = 4, 1 << 22
    refused(call, r"\(n_streams \* n_slots \+ n_staged\) \* 128 is 2147483648")


def test_a_layer_that_never_seals_is_used_without_blocks(any_one: Device) -> None:
    """Also a mapped one, in a context so small that all pages stay open; its map need not be there."""
    source = made(any_one, seals=False)
    map_ = np.zeros(2, np.int32), np.zeros((2, 64, 64), np.float32)
    for storage in (source, made(any_one, Layer(PLAIN.k, replace(V, source=0)), seals=False, source=source, map_=map_)):
        Call(any_one, "rows", storage)()
        for verb in ("attend", "unpack", "read_keys", "write_keys"):
            Call(any_one, verb, storage)()
        refused(Call(any_one, "update", storage), "n_seals is 2 and n_unseals 0, but the layer never seals")
    storage.c.mapped = 0
    for verb in ("rows", "attend", "unpack", "read_keys"):
        Call(any_one, verb, storage)()


# ---- what lies behind pointers: a CPU can look ----


@pytest.fixture
def here() -> Cpu:
    on = device("cpu-scalar")
    assert isinstance(on, Cpu)
    return on


@pytest.mark.parametrize("verb", ["update", "read_keys", "write_keys"])
@pytest.mark.parametrize(("word", "value"), [(0, 2), (0, -1), (1, 4), (1, -1), (2, 3), (2, -3), (2, -(1 << 31))])
def test_moves_of_pages_that_there_are_not(here: Cpu, verb: str, word: int, value: int) -> None:
    call = Call(here, verb)
    call.words.set(np.array([value], np.int32), 4 * (9 + word))
    refused(call, rf"\[1\] is page .*{value}.*; there are 4 pages, 2 streams, 3 slots and, from -3 down, 0 byte slots")


SEALS = [(0, BYTES - 2), (0, NONE), (0, 1), (BYTES - 2, SEALED), (BYTES, BYTES - 1), (BYTES, 1), (BYTES, -(1 << 31))]


@pytest.mark.parametrize(("slot", "small"), SEALS)
def test_moves_between_places_that_there_are_not(here: Cpu, slot: int, small: int) -> None:
    """Neither from one to the other nor back; two byte slots."""
    storage = made(here, n_bytes=2)
    there = (
        rf"is page 1 of stream 0 and slot {slot}, smaller {small}; .* 3 slots and, from -3 down, 2 byte slots; -1 is s"
    )
    move, before = (
        Move(1, slot, small=small),
        (storage.byte_blocks(), storage.pages(), storage.rows()[0].view(np.uint8)),
    )
    for seals, unseals in (([move], []), ([], [move])):
        with pytest.raises(Refused, match=there):
            storage.update(seals, unseals)
    after = storage.byte_blocks(), storage.pages(), storage.rows()[0].view(np.uint8)
    for now, was in zip(after, before, strict=True):
        np.testing.assert_array_equal(now, was)
    with pytest.raises(Refused, match=r"unseals.* slot -3, smaller -1"):
        storage.update(unseals=[Move(1, BYTES)])
    never = made(here, seals=False, n_bytes=2)
    with pytest.raises(Refused, match=r"seals.* slot -3, smaller -1; .*-1 is not allowed: the layer never seals"):
        never.update([Move(1, BYTES)])


@pytest.mark.parametrize(("slot", "refill"), [(2, 2), (2, 5), (2, -1), (3, 4), (3, 0)])
def test_slots_that_cannot_be_refilled(here: Cpu, slot: int, refill: int) -> None:
    """A slot of a stream is refilled from the stage, which has the slots 3 and 4, and nothing else is."""
    call = Call(here, "update", made(here, staged=2))
    call.words.set(np.array([slot, refill], np.int32), 4 * (9 + 2))
    refused(
        call, rf"seals\[1\] refills slot {slot} from slot {refill}; it must be a slot of a stream, 0 to 2, and one of"
    )


@pytest.mark.parametrize("row", [-1, 6 * 128])
def test_rows_that_there_are_not(here: Cpu, row: int) -> None:
    call = Call(here, "rows")
    call.rows.set(np.array([0, row], np.int32))
    refused(call, rf"rows\[1\] is {row}, must be 0 to 767")


def test_rows_of_a_stage_that_is_smaller(here: Cpu) -> None:
    call = Call(here, "rows", made(here, staged=2))
    call.rows.set(np.array([0, 8 * 128], np.int32))
    refused(call, r"rows\[1\] is 1024, must be 0 to 1023")
    call = Call(here, "attend", made(here, staged=2))
    call.table.set(np.array([5], np.int32), 4 * 6)
    refused(call, "table says 5 of page 2 of stream 1; there are 5 slots")


@pytest.mark.parametrize("verb", ["attend", "unpack"])
def test_tables_that_name_no_slot(here: Cpu, verb: str) -> None:
    for slot, n_bytes in ((3, 0), (-3, 0), (-5, 2), (-(1 << 31), 2)):
        call = Call(here, verb, made(here, n_bytes=n_bytes))
        call.table.set(np.array([slot], np.int32), 4 * 6)
        refused(
            call, f"table says {slot} of page 2 of stream 1; there are 3 slots, -1 is sealed.* {n_bytes} byte slots"
        )
    call = Call(here, verb, made(here, seals=False))
    call.table.set(np.array([SEALED], np.int32), 4 * 6)
    refused(call, "table says -1 of page 2 of stream 1; there are 3 slots, -1 is not allowed")
    call = Call(here, verb)
    first = Buffer(here, np.array([1], np.int32))
    call.a.first_stream = first.pointer("int32_t")
    refused(call, "first_stream is 1, must be 0 to 0")


def test_threads_that_there_are_not(here: Cpu) -> None:
    ffi, _ = native.load()
    call = Call(here, "attend")
    for exec_, message in (
        (ffi.NULL, "exec must not be null"),
        (ffi.new("xq_exec *", {"ith": 0, "nth": 0}), "exec.nth is 0"),
        (ffi.new("xq_exec *", {"ith": 2, "nth": 2}), "exec.ith is 2, must be 0 to 1"),
    ):
        assert here.backend.attend(call.storage.c, call.a, exec_) < 0
        assert message in native.error()


# ---- stores ----


def test_stores_that_cannot_be_made(here: Cpu) -> None:
    ffi, lib = native.load()
    store, rows = ffi.new("xq_store *"), ffi.cast("uint16_t *", 4096)

    def init(layer: Layer = PLAIN, streams: tuple[int, int] = (0, 0), **change: int) -> int:
        shape = {"d": 64, "e": 64, "n_head_kv": 2, "n_pages": 4, "n_slots": 3, "n_streams": 1} | change
        area = ffi.new("xq_shape *", shape)
        return int(
            lib.xq_store_init(store, c_layer(layer), area, ffi.cast("uint8_t *", 64), streams[0], rows, streams[1])
        )

    assert init() == 0
    bad: list[tuple[dict[str, Any], str]] = [
        ({"n_pages": 0}, "shape: n_pages is 0"),
        ({"n_head_kv": 40000}, "shape: n_head_kv is 40000"),
        ({"n_bytes": -1}, "shape: n_bytes is -1"),
        ({"d": 60}, "head widths are 60 and 64"),
        ({"layer": Layer(replace(PLAIN.k, bits=9), V)}, "bits is 9, must be 0 to 4"),
        ({"n_streams": 2}, "streams are 0 bytes of blocks and 0 bytes of rows apart"),
        ({"n_streams": 2, "streams": (1 << 20, (1 << 20) + 1)}, "rows are 2 bytes"),
    ]
    for change, message in bad:
        assert init(**change) < 0
        assert message in native.error()
    assert lib.xq_store_init(store, c_layer(PLAIN), ffi.NULL, ffi.NULL, 0, rows, 0) < 0
    assert "shape must not be null" in native.error()
    assert lib.xq_attend_states(store, ffi.new("xq_attend_args *", {"n_parts": 1, "n_streams": 1})) < 0
    assert "n_tokens is 0" in native.error()


@pytest.mark.parametrize(
    ("side", "owner", "message"),
    [
        (Side(4, 128, "lsq", owner=0), Side(3, 128), "codes of 3 bits"),
        (Side(4, 128, "lsq", owner=0), Side(4, 128, "lsq", owner=0), "the owner's codes must be its own"),
        (Side(4, 128), Side(4, 128), "the layer's plan says owner -1"),
    ],
)
def test_codes_that_cannot_be_borrowed(here: Cpu, side: Side, owner: Side, message: str) -> None:
    ffi, lib = native.load()
    layer, other = ffi.new("xq_store *"), ffi.new("xq_store *")
    shape, at = ffi.new("xq_shape *", (64, 64, 2, 4, 3, 1)), (ffi.cast("uint8_t *", 64), ffi.cast("uint16_t *", 64))
    for store, k in ((layer, side), (other, owner)):
        assert lib.xq_store_init(store, c_layer(Layer(k, V)), shape, at[0], 0, at[1], 0) == 0
    assert lib.xq_store_borrow(layer, 1, other) < 0
    assert message in native.error()
    other.n_pages = 5
    assert lib.xq_store_borrow(layer, 1, other) < 0
    assert "the owner has 2 KV heads, 5 pages and 1 streams" in native.error()


def test_maps_that_cannot_be_read(here: Cpu) -> None:
    ffi, lib = native.load()
    source, heads, weight = made(here), ffi.new("int32_t[2]"), ffi.new("float[1]")
    reader = made(
        here,
        Layer(PLAIN.k, replace(V, source=0)),
        source=source,
        map_=(np.zeros(2, np.int32), np.zeros((2, 64, 64), np.float32)),
    )
    assert lib.xq_store_map(made(here).c, source.c, heads, weight) < 0
    assert "width 64 and source -1" in native.error()
    assert lib.xq_store_map(reader.c, reader.c, heads, weight) < 0
    assert "source 0; the layer's" in native.error()
    assert lib.xq_store_map(reader.c, source.c, ffi.NULL, weight) < 0
    assert "heads must not be null" in native.error()


def latent(on: Device, own: int = 0) -> Storage:
    rows = random_rows(np.random.default_rng(0), 2, 2, 3, 64, own)
    return Storage(on, PLAIN, rows, 4, latent=48)


def test_values_that_are_channels_of_keys(any_one: Device) -> None:
    """All of them, or some."""
    for own in (0, 16):
        for verb in VERBS:
            call = Call(any_one, verb, latent(any_one, own))
            if verb == "rows" and not own:
                call.a.v_cur = native.load()[0].NULL
            call()
    call = Call(any_one, "unpack", latent(any_one))
    call.a.is_k = 0
    refused(call, "is_k is 0, must be 1 to 1")
    call = Call(any_one, "attend", latent(any_one))
    call.storage.c.latent = 0
    refused(call, "v.width is 0, must be a multiple of 16 from 16")
    call = Call(any_one, "attend", latent(any_one, 16))
    call.storage.c.mapped = 1
    refused(call, "latent is 48 and mapped 1; one of them must be 0")


@pytest.mark.parametrize("n", [80, 24, 0])
def test_values_that_keys_do_not_have(here: Cpu, n: int) -> None:
    assert native.load()[1].xq_store_latent(made(here).c, n) < 0
    assert f"n is {n}, must be a multiple of 16 from 16 to 64, and mapped 0, 0" in native.error()


@pytest.mark.parametrize("verb", VERBS)
def test_kernels_that_cannot_run_are_an_error_of_every_verb(verb: str) -> None:
    """XQUANT_KERNELS may name a set that this machine lacks: in a process of its own."""
    on = remote.Remote("mmx", [remote.build_here()], "", asked="mmx")
    refused(Call(on, verb), 'XQUANT_KERNELS: kernel set "mmx" is unknown; this machine can run .*scalar')
    on.runner.close()
