"""Stores that cannot be made, borrow or read a map: a message that names it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from support.calls import PLAIN, made
from support.devices import Cpu
from support.pages_of_codes import V
from support.storage import c_layer
from xquant_gguf import native
from xquant_gguf.plan import Layer, Side


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
