"""Good calls of the verbs, of which tests change one field each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from support.devices import Buffer, Device, Refused
from support.pages_of_codes import V, random_rows
from support.storage import NONE, Storage
from xquant_gguf import native
from xquant_gguf.plan import Layer, Side

PLAIN = Layer(Side(4, 128), V)
VERBS = ("update", "rows", "attend", "unpack", "read_keys", "write_keys")


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
