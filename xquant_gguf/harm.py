"""What a choice of codes does to a layer's attention: the squared error of the outputs of some queries.

    error = |softmax(q k'^T) v' - softmax(q k^T) v|^2        k, v: keys and values of F16; k', v': read back from codes

Its ratio to the KL divergence that it causes depends on the layer much more than on the choice, so that one run of the
model for each side of a layer tells the harm of all choices.  A cap on scores and position slopes are left out.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from xquant_gguf import codec
from xquant_gguf.plan import PAGE, Side, ValueMap
from xquant_gguf.probe import Floats, Rows

QUERIES = 48
"""Tokens whose queries are looked at, spread evenly over those that are scored."""
RIDGE = 0.01
"""Of the mean eigenvalue, added when a map is fitted."""


def read_back(side: Side, rows: Rows, name: str, predicted: Floats | None = None) -> Rows:
    """What pages of keys or values (name: "k" or "v"), [KV head][token][width], give back; the first page stays F16.

    predicted [KV head][token][width]: what a map says of values; the remainder is stored.
    """
    out = rows.copy()
    side = replace(side, source=-1)
    for h, head in enumerate(rows):
        for first in range(PAGE, len(head), PAGE):
            page = slice(first, first + PAGE)
            if name == "k":
                out[h, page] = codec.unseal_k(side, head.shape[1], *codec.seal_k(side, head[page]))
            else:
                told = None if predicted is None else np.ascontiguousarray(predicted[h, page].T)
                sealed = codec.seal_v(side, head[page], predicted=told)
                out[h, page] = codec.unseal_v(side, head.shape[1], *sealed, told)
    return out


class Attention:
    """Outputs of one layer at some of the scored tokens.

    queries [scored token][head][width]: times the scale of scores; k, v [KV head][token][width]: of all tokens, the
    scored ones last.
    """

    def __init__(self, queries: Floats, k: Rows, v: Rows) -> None:
        n, n_scored = k.shape[1], len(queries)
        picked = np.linspace(0, n_scored - 1, min(QUERIES, n_scored)).astype(int)
        rep = queries.shape[1] // len(k)
        by_head = queries[picked].reshape(len(picked), len(k), rep, -1).transpose(1, 0, 2, 3)
        self._q = np.ascontiguousarray(by_head).reshape(len(k), len(picked) * rep, -1)
        self._visible = np.repeat(n - n_scored + picked + 1, rep)
        self._k, self._v = k.astype(np.float32), v.astype(np.float32)
        self._p = [self._weights(q, head) for q, head in zip(self._q, self._k, strict=True)]

    def _weights(self, q: Floats, k: Floats) -> Floats:
        scores = q @ k.T
        scores[np.arange(len(k)) >= self._visible[:, None]] = -np.inf
        scores -= scores.max(1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(1, keepdims=True)
        return scores

    def error(self, name: str, rows: Rows) -> float:
        """Squared error of all outputs if the first keys or values were these, [KV head][token][width]."""
        n, total = rows.shape[1], 0.0
        for h, head in enumerate(rows.astype(np.float32)):
            if name == "k":
                p = self._weights(self._q[h], np.concatenate([head, self._k[h, n:]])) - self._p[h]
                total += float(((p @ self._v[h]) ** 2).sum())
            else:
                total += float(((self._p[h][:, :n] @ (head - self._v[h, :n])) ** 2).sum())
        return total


def stored(rows: Rows, side: Side) -> Floats:
    """What a layer with own codes stores of its values, [KV head][token][e], in the rotated space."""
    eye = np.eye(rows.shape[2], dtype=np.float32)

    def page(x: Rows) -> NDArray[np.float32]:
        return codec.predict_v(side, x.shape[1], *codec.seal_v(side, x), eye).T

    return np.stack([np.concatenate([page(h[i : i + PAGE]) for i in range(0, len(h), PAGE)]) for h in rows])


def fit_map(source: Floats, rows: Rows) -> ValueMap:
    """The map that predicts a layer's values, rows [KV head][token][e], from what its source stores of its own.

    Each head takes the one source head that leaves least over.
    """
    heads, weights = [], []
    grams = [u.T @ u for u in source]
    for x in rows:
        y = codec.hadamard(x.astype(np.float32))
        fits = []
        for h, (u, gram) in enumerate(zip(source, grams, strict=True)):
            w = np.linalg.solve(gram + RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)), u.T @ y)
            fits.append((float(((y - u @ w) ** 2).sum()), h, w.astype(np.float16)))
        _, head, weight = min(fits, key=lambda fit: fit[0])
        heads.append(head)
        weights.append(weight.astype("<f2").tobytes())
    return ValueMap(tuple(heads), b"".join(weights))


def guess(value_map: ValueMap, source: Floats) -> Floats:
    """What a map predicts, [KV head][token][e] in the rotated space, from what its source stores."""
    e = source.shape[2]
    weights = np.frombuffer(value_map.weight, "<f2").reshape(-1, e, e).astype(np.float32)
    return np.stack([source[head] @ weight for head, weight in zip(value_map.heads, weights, strict=True)])
