"""A numpy transformer with an XQuant KV cache, written from the rules alone: what the fork of llama.cpp must compute.

Everything is float64 except what the cache rounds and the angles of RoPE (float32, one multiplication per pair of
channels, as llama.cpp computes them: at position 700 another order moves a key by more than an F16 rounding step).

The rule of the cache, for one sequence whose tokens lie in cells 0, 1, 2, ... and P = 128 cells a page:

    before a micro-batch is written, with T tokens stored, page p >= pinned is sealed if P (p + 1) <= T - window
    then the keys (after RoPE) and values of the micro-batch are written as F16 rows
    then its queries attend: F16 rows of open pages, dequantized values of sealed pages, causal within the micro-batch

With open_bits 8 there is one slot of F16 rows, and other open pages lie in bytes (moves_to_bytes).

Pages are sealed from their F16 rows, or bytes, by the reference codec, which is the specification of the codes (arXiv
2510.11236, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from support.tiny_gguf import Shape, Weights
from xquant_gguf import reference
from xquant_gguf.plan import Layer

PAGE = 128

Array = NDArray[np.float64]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x [n][width] over its root mean square, times weight [width]."""
    scaled: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight
    return scaled


def rope(x: Array, positions: NDArray[np.int64], freq_base: float, halves: bool) -> Array:
    """Rotates pairs of channels of x [n][head][d] by position times freq_base^(-2 i / d) (arXiv 2104.09864)."""
    d = x.shape[-1]
    step = np.float32(np.float32(freq_base) ** np.float32(-2.0 / d))
    theta = np.empty((len(positions), d // 2), dtype=np.float32)
    theta[:, 0] = positions
    for i in range(1, d // 2):
        theta[:, i] = theta[:, i - 1] * step
    cos, sin = (f(theta).astype(np.float64)[:, None, :] for f in (np.cos, np.sin))
    first, second = (x[..., : d // 2], x[..., d // 2 :]) if halves else (x[..., 0::2], x[..., 1::2])
    turned = first * cos - second * sin, first * sin + second * cos
    return np.concatenate(turned, axis=-1) if halves else np.stack(turned, axis=-1).reshape(x.shape)


def turned(x: Array) -> Array:
    """x [n][head][d] times Sylvester's normalised Hadamard matrix, in blocks of the largest power of two dividing d.

    In single precision and llama.cpp's order: keys that the cache rounds to F16 shall seldom round to another number.
    """
    block = x.shape[-1] & -x.shape[-1]
    y = x.reshape(-1, block).astype(np.float32) * np.float32(1 / np.sqrt(np.float32(block)))
    half = 1
    while half < block:
        pair = y.reshape(-1, block // (2 * half), 2, half)
        y = np.stack([pair[:, :, 0] + pair[:, :, 1], pair[:, :, 0] - pair[:, :, 1]], axis=2).reshape(-1, block)
        half *= 2
    return y.astype(np.float64).reshape(x.shape)


class Side:
    """Keys or values of one layer: F16 rows, codes of sealed pages, and what attention reads."""

    def __init__(self, n_ctx: int, n_head_kv: int, width: int) -> None:
        self.width = width
        self.rows = np.zeros((n_head_kv, n_ctx, width), dtype=np.float16)
        self.read = np.zeros((n_head_kv, n_ctx, width))
        self.codes: dict[tuple[int, int], bytes] = {}  # (KV head, page) -> codes of a sealed page
        self.parameters: dict[tuple[int, int], bytes] = {}
        self.bytes: dict[tuple[int, int], NDArray[np.float32]] = {}  # (KV head, page) -> what the bytes say

    def write(self, first: int, x: Array) -> None:
        """Stores x [n][head][width] as the rows of cells first, first + 1, ..."""
        rows = x.astype(np.float32).astype(np.float16).transpose(1, 0, 2)
        end = first + len(x)
        self.rows[:, first:end] = rows
        self.read[:, first:end] = rows

    def page(self, head: int, page: int) -> NDArray[np.floating]:
        """The rows [PAGE][width] of a page: F16, or what its bytes say."""
        if (head, page) in self.bytes:
            return self.bytes[head, page]
        return self.rows[head, page * PAGE : (page + 1) * PAGE]

    def replace(self, head: int, page: int, values: NDArray[np.float32]) -> None:
        """From now on attention reads these values [PAGE][width] in a page."""
        self.read[head, page * PAGE : (page + 1) * PAGE] = values


class Oracle:
    """One sequence of a tiny model; decode() takes tokens in order and returns the logits of each.

    layers: what each layer stores, None: always F16 rows; window: newest tokens that stay F16, negative: never seal;
    pinned: first pages that stay F16; n_ubatch: most tokens of a micro-batch; open_bits: as a plan has it.
    """

    def __init__(
        self,
        shape: Shape,
        weights: Weights,
        layers: Sequence[Layer | None],
        window: int,
        pinned: int,
        n_ubatch: int,
        open_bits: int = 16,
    ) -> None:
        if len(layers) != shape.n_layer:
            raise ValueError(f"layers must have {shape.n_layer} entries, not {len(layers)}")
        self.shape = shape
        self.weights = {name: weight.astype(np.float64) for name, weight in weights.items()}
        self.layers = layers
        self.window = window
        self.pinned = pinned
        self.n_ubatch = n_ubatch
        self.open_bits = open_bits
        self.in_rows: int | None = None  # the page in the slot, with open_bits 8
        self.maps: dict[int, tuple[Sequence[int], NDArray[np.float32]]] = {}
        self.transforms: dict[int, Array] = {}  # [KV head][d][d], what keys are multiplied by
        self.n_stored = 0
        self.sealed: set[int] = set()
        self.keys = [Side(shape.n_ctx, shape.n_head_kv, shape.key_length) for _ in layers]
        self.values = [Side(shape.n_ctx, shape.n_head_kv, shape.value_length) for _ in layers]

    def decode(self, tokens: Sequence[int]) -> Array:
        """Logits [n][vocabulary] of tokens, micro-batch by micro-batch."""
        return np.concatenate(
            [self.micro_batch(tokens[i : i + self.n_ubatch]) for i in range(0, len(tokens), self.n_ubatch)]
        )

    def pages_to_seal(self) -> Iterator[int]:
        """The open pages whose newest token left the window."""
        if self.window >= 0:
            for page in range(self.pinned, (self.n_stored - self.window) // PAGE):
                if page not in self.sealed:
                    yield page

    def leaves(self, page: int, end: int) -> bool:
        """Whether a page has left the window when `end` tokens are stored; the one that is written next never has."""
        newest = PAGE * (page + 1)
        return page >= self.pinned and newest <= end and 0 <= self.window <= end - newest

    def moves_to_bytes(self, n: int, sealed: Sequence[int]) -> tuple[list[int], list[int]]:
        """Pages that become bytes before and after a micro-batch of n tokens, before which some pages are sealed.

        A page that the micro-batch begins, and that stays open, gets the slot if it is free or holds a full page that
        stays open, which becomes bytes.  All others lie in the stage; afterwards one page that stays open gets the
        slot, if possible one that is not full, or else not a pinned one, and the others become bytes.
        """
        begin, end = self.n_stored, self.n_stored + n
        slot = None if self.in_rows in sealed else self.in_rows
        before: list[int] = []
        staged: list[int] = []
        for page in range(-(-begin // PAGE), -(-end // PAGE)):
            if n > 1 and self.leaves(page, end):
                staged.append(page)
                continue
            # what is not full is being written
            if slot is not None and slot < begin // PAGE and (n == 1 or not self.leaves(slot, end)):
                before.append(slot)
                slot = None
            if slot is None:
                slot = page
            else:
                staged.append(page)
        stay = [page for page in (*staged, slot) if page is not None and not self.leaves(page, end)]
        if staged and slot is not None:
            slot = max(stay, key=lambda p: (PAGE * (p + 1) > end, p >= self.pinned, p), default=None)
        self.in_rows = slot
        return before, [page for page in stay if staged and page != slot]

    def shrink(self, il: int, page: int) -> None:
        """Replaces the F16 rows of a page in layer il by bytes, keys and values."""
        if self.layers[il] is None:
            return
        for stores, is_k in ((self.keys, True), (self.values, False)):
            store = stores[il]
            for head in range(self.shape.n_head_kv):
                codes, parameters, _ = reference.shrink(store.page(head, page), np.ones(PAGE, dtype=bool), is_k)
                store.bytes[head, page] = reference.widen(codes, parameters, is_k)
                store.replace(head, page, store.bytes[head, page])

    def seal(self, il: int, page: int) -> None:
        """Replaces the F16 rows of a page in layer il by codes, keys and values."""
        layer = self.layers[il]
        if layer is None:
            return
        valid = np.ones(PAGE, dtype=bool)
        for side, stores, seal, dequantize in (
            (layer.k, self.keys, reference.seal_k, reference.dequantize_k),
            (layer.v, self.values, reference.seal_v, reference.dequantize_v),
        ):
            store = stores[il]
            for head in range(self.shape.n_head_kv):
                mapped = self.predict(il, head, page) if side.source >= 0 else []
                borrowed = stores[side.owner].codes[head, page] if side.owner >= 0 else None
                codes, parameters, _ = seal(side, store.page(head, page), valid, borrowed, *mapped)
                store.codes[head, page] = codes if borrowed is None else borrowed
                store.parameters[head, page] = parameters
                values = dequantize(side, store.width, store.codes[head, page], parameters, *mapped)
                store.replace(head, page, values)

    def predict(self, il: int, head: int, page: int) -> list[NDArray[np.float32]]:
        """What the map of a layer says of a page's values."""
        layer, (heads, weight) = self.layers[il], self.maps[il]
        assert layer is not None
        source = self.layers[layer.v.source]
        assert source is not None
        store, at = self.values[layer.v.source], (heads[head], page)
        return [reference.predict_v(source.v, store.width, store.codes[at], store.parameters[at], weight[head])]

    def attention(self, il: int, q: Array) -> Array:
        """softmax(q k / sqrt(d)) v for q [n][head][d] of the newest n cells; the result is [n][head * e]."""
        n, n_head, d = q.shape
        end = self.n_stored + n
        keys, values = self.keys[il].read[:, :end], self.values[il].read[:, :end]
        hidden = np.arange(end)[None, :] > np.arange(self.n_stored, end)[:, None]  # [n][cell]
        sinks = self.weights.get(f"blk.{il}.attn_sinks.weight")
        out = np.empty((n, n_head, values.shape[-1]))
        for head in range(n_head):
            head_kv = head // (n_head // self.shape.n_head_kv)
            scores = q[:, head] @ keys[head_kv].T / np.sqrt(d)
            scores[hidden] = -np.inf
            sink = -np.inf if sinks is None else float(sinks[head])
            top = np.maximum(scores.max(axis=1, keepdims=True), sink)
            p = np.exp(scores - top)
            out[:, head] = p @ values[head_kv] / (p.sum(axis=1, keepdims=True) + np.exp(sink - top))
        return out.reshape(n, -1)

    def rotates(self, il: int) -> bool:
        """Whether keys are stored, and queries read them, times a Hadamard matrix."""
        layer = self.layers[il]
        return layer is not None and layer.k.rotate

    def factors(self, il: int) -> Array:
        """What channels of keys [KV head][d] are multiplied by before they are rotated: 1 without a bias."""
        shape = self.shape
        d, n_pairs, others = shape.key_length, shape.key_length // 2, 0.5
        means = {}  # over the two channels of a pair, of a bias squared
        for name, n_head in (("q", shape.n_head), ("k", shape.n_head_kv)):
            bias = self.weights.get(f"blk.{il}.attn_{name}.bias", np.zeros(n_head * d)).reshape(n_head, d) ** 2
            pairs = bias.reshape(n_head, 2, -1) if shape.rope_halves else bias.reshape(n_head, -1, 2).swapaxes(1, 2)
            means[name] = pairs.mean(axis=1)
        turns = shape.freq_base ** (-np.arange(n_pairs) / n_pairs)
        spread = 1 - np.abs(np.exp(1j * turns[:, None] * np.arange(PAGE)).mean(axis=1)) ** 2
        of_queries = means["q"].reshape(shape.n_head_kv, -1, n_pairs).mean(axis=1)
        out: Array = ((others + of_queries) / (others + means["k"] * spread)) ** 0.25
        out = np.where([[f"blk.{il}.attn_k.bias" in self.weights]], out, 1.0)
        return np.concatenate([out, out], axis=1) if shape.rope_halves else np.repeat(out, 2, axis=1)

    def project(self, il: int, name: str, x: Array, n_head: int) -> Array:
        """Query, key or value heads [n][head][width] of x [n][n_embd]."""
        y = x @ self.weights[f"blk.{il}.attn_{name}.weight"].T
        bias = self.weights.get(f"blk.{il}.attn_{name}.bias")
        return (y if bias is None else y + bias).reshape(len(x), n_head, -1)

    def micro_batch(self, tokens: Sequence[int]) -> Array:
        """Logits [n][vocabulary] of at most n_ubatch tokens."""
        shape, weights = self.shape, self.weights
        positions = np.arange(self.n_stored, self.n_stored + len(tokens))
        pages = list(self.pages_to_seal())
        before, after = self.moves_to_bytes(len(tokens), pages) if self.open_bits == 8 else ([], [])
        x = weights["token_embd.weight"][list(tokens)]
        for il in range(shape.n_layer):
            block = f"blk.{il}."
            for page in pages:
                self.seal(il, page)
            for page in before:
                self.shrink(il, page)
            h = rms_norm(x, weights[block + "attn_norm.weight"], shape.rms_eps)
            q = rope(self.project(il, "q", h, shape.n_head), positions, shape.freq_base, shape.rope_halves)
            k = rope(self.project(il, "k", h, shape.n_head_kv), positions, shape.freq_base, shape.rope_halves)
            if self.rotates(il):
                s = self.factors(il).astype(np.float32)
                k, q = turned(s * k), turned(q / np.repeat(s, shape.n_head // shape.n_head_kv, axis=0))
            if il in self.transforms:
                m, n_rep = self.transforms[il], shape.n_head // shape.n_head_kv
                k = np.einsum("hij,nhj->nhi", m, k)
                q = np.einsum("nhj,hji->nhi", q, np.repeat(np.linalg.inv(m), n_rep, axis=0))
            self.keys[il].write(self.n_stored, k)
            self.values[il].write(self.n_stored, self.project(il, "v", h, shape.n_head_kv))
            x = x + self.attention(il, q) @ weights[block + "attn_output.weight"].T
            for page in after:
                self.shrink(il, page)
            h = rms_norm(x, weights[block + "ffn_norm.weight"], shape.rms_eps)
            gate = h @ weights[block + "ffn_gate.weight"].T
            up = h @ weights[block + "ffn_up.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[block + "ffn_down.weight"].T
        self.sealed.update(pages)
        self.n_stored += len(tokens)
        x = rms_norm(x, weights["output_norm.weight"], shape.rms_eps)
        return x @ weights["output.weight"].T
