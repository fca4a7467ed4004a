"""What the verbs refuse: a message that names it, and nothing is changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from support import remote
from support.calls import PLAIN, VERBS, Call, made, refused
from support.devices import Buffer, Cpu, Device, Refused, device
from support.pages_of_codes import V, random_rows
from support.storage import BYTES, NONE, SEALED, Move, Storage
from xquant_gguf import native
from xquant_gguf.plan import Layer


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
    ("attend", "rotate", 2, "rotate is 2, must be 0 to 1"),
    ("rows", "rotate", -1, "rotate is -1, must be 0 to 1"),
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


@pytest.mark.parametrize("verb", ["rows", "attend"])
def test_a_cpu_rotates_nothing(verb: str) -> None:
    call = Call(device("cpu-scalar"), verb)
    call.a.rotate = 1
    refused(call, "on a CPU: rotate is 1, must be 0 to 0")


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
    ("first_block", -1, "first_block is -1, must be 0 to 3"),
    ("first_block", 4, "first_block is 4, must be 0 to 3"),
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


def test_codes_of_a_page_that_has_no_block(here: Cpu) -> None:
    """Page 1; it may lie in bytes."""
    storage = made(here, n_bytes=1, first_block=2)
    storage.update([Move(2, 0), Move(1, 1, small=BYTES)])
    on = "-1 is sealed, of pages from 2 on"
    for seals, unseals in (([Move(1, 0)], []), ([Move(1, BYTES)], []), ([], [Move(1, 0)])):
        with pytest.raises(Refused, match=rf"is page 1 of stream 0 and slot .*, smaller -1; .*{on}"):
            storage.update(seals, unseals)
    for verb in ("attend", "unpack"):
        call = Call(here, verb, storage)
        call.table.set(np.array([SEALED], np.int32), 4)
        refused(call, f"table says -1 of page 1 of stream 0; there are 3 slots, {on}")
    with pytest.raises(Refused, match=rf"pages\[0\] is page 1 of .*{on}"):
        storage.read_keys([Move(1, SEALED)])


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
