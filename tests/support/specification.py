"""What the verbs must do, in numpy: sealed pages by reference.py, attention in double precision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from support.storage import BYTES, NONE, SEALED, Floats, Halves, Storage
from xquant_gguf import reference
from xquant_gguf.plan import PAGE

Doubles = NDArray[np.float64]


def finite(x: Floats) -> Halves:
    """What is stored of x: rounded to F16; not-a-numbers are 0 and what is beyond F16 is +-65504."""
    return np.clip(np.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504), -65504, 65504).astype(np.float16)


class Pages:
    """All pages of a layer, read once."""

    def __init__(self, of: Storage) -> None:
        self.of, self.open = of, of.rows()
        self.bytes = of.byte_blocks() if of.n_bytes else None
        layers = [x for x in (of, of.owner, of.source) if x is not None and x.blocks is not None]
        self.blocks = {id(x): x.pages() for x in layers}

    def parts(self, of: Storage, name: str, stream: int, head: int, page: int) -> tuple[bytes, bytes]:
        """Codes, its own or its owner's, and parameters of a sealed page."""
        own = of if getattr(of.layer, name).owner < 0 else of.owner
        assert own is not None
        codes = self.blocks[id(own)][stream, head, page, own.part_at(name)[0]]
        return codes.tobytes(), self.blocks[id(of)][stream, head, page, of.part_at(name)[1]].tobytes()

    def rows(self, name: str, stream: int, head: int, page: int) -> Floats:
        """Keys or values [PAGE][width] of a sealed page, exactly as it stores them."""
        if name == "v" and self.of.latent:
            keys = self.rows("k", stream, head, page)[:, : self.of.latent]
            own = [self.stored_rows("v", stream, head, page)] if self.of.stored_e else []
            return np.concatenate([keys, *own], 1)
        return self.stored_rows(name, stream, head, page)

    def stored_rows(self, name: str, stream: int, head: int, page: int) -> Floats:
        """The same of what is stored of a side: not those values that are channels of keys."""
        of, parts = self.of, self.parts(self.of, name, stream, head, page)
        if name == "k":
            return reference.dequantize_k(of.layer.k, of.d, *parts)
        predicted = None
        if of.source is not None and of.map is not None:
            heads, weight = of.map
            from_source = self.parts(of.source, "v", stream, int(heads[head]), page)
            predicted = reference.predict_v(of.source.layer.v, of.e, *from_source, weight[head])
        return reference.dequantize_v(of.layer.v, of.stored_e, *parts, predicted)

    def widened(self, name: str, stream: int, head: int, byte_slot: int) -> Floats:
        """Keys or values [PAGE][width] of a page in bytes, not rounded to F16."""
        assert self.bytes is not None
        block, of = self.bytes[stream, head, byte_slot], self.of
        if name == "v" and of.latent:
            keys = reference.widen(*of.byte_part(block, "k"), True)[:, : of.latent]
            own = [reference.widen(*of.byte_part(block, "v"), False)] if of.stored_e else []
            return np.concatenate([keys, *own], 1)
        return reference.widen(*of.byte_part(block, name), name == "k")

    def stored(self, name: str, table: Sequence[Sequence[int]], first_stream: int = 0) -> Floats:
        """Keys or values [stream][KV head][cell][width] as pages store them, not rounded to F16; 0 without cells."""
        of, open_rows = self.of, self.open["kv".index(name)]
        if name == "v" and of.latent:
            open_rows = np.concatenate([self.open[0][..., : of.latent], open_rows], -1)
        out = np.zeros((len(table), of.heads, len(table[0]), PAGE, open_rows.shape[-1]), np.float32)
        for s, slots in enumerate(table):
            for page, slot in enumerate(slots):
                for head in range(of.heads):
                    if slot == SEALED:
                        out[s, head, page] = self.rows(name, first_stream + s, head, page)
                    elif slot <= BYTES:
                        out[s, head, page] = self.widened(name, first_stream + s, head, BYTES - slot)
                    elif slot != NONE:
                        out[s, head, page] = open_rows[first_stream + s, head, slot]
        return out.reshape(len(table), of.heads, -1, out.shape[-1])


def slopes(max_bias: float, n_head: int) -> Doubles:
    """ALiBi's factor of each head (arXiv 2108.12409); 1 without a bias."""
    if max_bias <= 0:
        return np.ones(n_head)
    n = 2 ** int(np.log2(n_head))
    first = 2.0 ** (-max_bias / n * np.arange(1, n + 1))
    more = 2.0 ** (-max_bias / 2 / n * np.arange(1, 2 * (n_head - n), 2))
    return np.concatenate([first, more])


def attention(
    q: Floats,
    table: Sequence[Sequence[int]],
    mask: Halves | None,
    keys: Floats,
    values: Floats,
    *,
    scale: float,
    softcap: float = 0.0,
    max_bias: float = 0.0,
    sinks: Floats | None = None,
) -> Doubles:
    """softmax(...) v: q [stream][token][head][d], keys and values [stream][KV head][cell][width]; zeros where nothing
    is visible."""
    n_streams, _, n_head, _ = q.shape
    out = np.zeros((*q.shape[:3], values.shape[-1]))
    for s in range(n_streams):
        hidden = np.repeat([slot == NONE for slot in table[s]], PAGE)[None]
        added = np.zeros((1, hidden.size)) if mask is None else mask[s].astype(np.float64)
        hidden = hidden | (added == -np.inf)
        added = np.where(hidden, 0, added)
        for h in range(n_head):
            k, v = (x[s, h * len(x[s]) // n_head].astype(np.float64) for x in (keys, values))
            scores = scale * (q[s, :, h].astype(np.float64) @ k.T)
            scores = softcap * np.tanh(scores / softcap) if softcap > 0 else scores
            scores = np.where(hidden, -np.inf, scores + slopes(max_bias, n_head)[h] * added)
            sink = -np.inf if sinks is None else float(sinks[h])
            top = np.maximum(scores.max(1, keepdims=True), sink)
            top = np.where(np.isfinite(top), top, 0)
            p = np.exp(scores - top)
            total = p.sum(1, keepdims=True) + np.exp(sink - top)
            out[s, :, h] = (p @ v) / np.where(total > 0, total, 1)
    return out
