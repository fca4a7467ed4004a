"""Keys and values as calibration stores them: sides by bits, what codes do to rows, maps between layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from xquant_gguf import codec
from xquant_gguf.plan import PAGE, Plan, Side, ValueMap
from xquant_gguf.probe import Rows
from xquant_gguf.transforms import Matrices, times

RIDGE = 0.1
"""Of the mean eigenvalue, added when a map is fitted."""
ERROR_PAGES = 8
"""Pages on which the codec's error is measured."""

VALUE_ETA = {3: 0.04, 4: 0.01}
"""Where the fit of values begins that no preset has: the least squared error over Gaussian groups of 64 and 128."""


@lru_cache(maxsize=1)
def _preset_sides() -> tuple[dict[int, Side], dict[int, Side]]:
    """Keys and values of the presets, by bits."""
    layers = [Plan.from_preset(name, 1).layers[0] for name in ("xquant", "xquant-small", "xquant-tiny")]
    return {layer.k.bits: layer.k for layer in layers}, {layer.v.bits: layer.v for layer in layers}


def key_side(bits: int, group: int = PAGE, param: str = "f16", rotate: bool = True) -> Side:
    """Keys as the presets store them; 1 bit as 2."""
    return replace(_preset_sides()[0][max(bits, 2)], bits=bits, group=group, param=param, rotate=rotate)


def value_side(bits: int, source: int = -1) -> Side:
    """Values as the presets store them, more than 2 bits as 2, but for eta; source: the layer that predicts them."""
    if bits == 0:
        return Side(0, 0, "minmax", "f16", True, source=source)
    preset = _preset_sides()[1][min(bits, 2)]
    return replace(preset, bits=bits, source=source, eta=VALUE_ETA.get(bits, preset.eta))


Guess = NDArray[np.float32] | None
"""What a map predicts of the values of one head, [token][e], in the rotated space."""


def _page_back(side: Side, page: NDArray[np.float16], name: str, guess: Guess) -> NDArray[np.float16]:
    """A page of one head, [PAGE][width], as its codes give it back."""
    if name == "k":
        return codec.unseal_k(side, page.shape[1], *codec.seal_k(side, page))
    predicted = None if guess is None else np.ascontiguousarray(guess.T)
    own = replace(side, source=-1)
    return codec.unseal_v(own, page.shape[1], *codec.seal_v(own, page, predicted=predicted), predicted)


def squared_error(side: Side, rows: Rows, name: str, guesses: Sequence[Guess] | None = None) -> float:
    """Squared error of a side on some pages of rows as they are stored; guesses: of each head."""
    total = 0.0
    for head, guess in zip(rows, guesses or [None] * len(rows), strict=True):
        for first in _pages(len(head)):
            page = head[first : first + PAGE]
            back = _page_back(side, page, name, None if guess is None else guess[first : first + PAGE])
            total += float(((back.astype(np.float32) - page.astype(np.float32)) ** 2).sum())
    return total


@dataclass(frozen=True, eq=False)
class KeyForm:
    """In which coordinates the keys of a layer are stored.

    rotate: a Hadamard matrix's.  matrices: their own (transforms.py).  Else those in which they come.
    """

    rotate: bool = False
    matrices: Matrices | None = None

    def side(self, bits: int, group: int = PAGE, param: str = "f16") -> Side:
        """Keys of so many bits; of 2 those with matrices, which are like Gaussian ones, are fitted like values."""
        side = key_side(bits, group, param, self.rotate)
        return side if self.matrices is None or bits != 2 else replace(side, fit="lloyd", eta=value_side(2).eta)

    def stored(self, rows: Rows) -> Rows:
        """Keys in these coordinates."""
        if self.matrices is not None:
            return times(self.matrices.astype(np.float32), rows)
        return _turned(rows) if self.rotate else rows.copy()

    def plain(self, rows: Rows) -> Rows:
        """The way back."""
        if self.matrices is not None:
            return times(np.linalg.inv(self.matrices.astype(np.float64)).astype(np.float32), rows)
        return _turned(rows) if self.rotate else rows


def _turned(rows: Rows) -> Rows:
    """Rows times the Hadamard matrix, which is its own inverse."""
    return codec.hadamard(rows.reshape(-1, rows.shape[2])).astype(np.float16).reshape(rows.shape)


def read_back_keys(side: Side, rows: Rows, form: KeyForm) -> Rows:
    """Keys as sealed pages would give them back, all but those of the first page."""
    out = form.plain(read_back(side, form.stored(rows), "k"))
    out[:, :PAGE] = rows[:, :PAGE]
    return out


def read_back(side: Side, rows: Rows, name: str, guesses: Sequence[Guess] | None = None) -> Rows:
    """Rows as sealed pages would give back what they store, all but those of the first page; guesses: of each head."""
    out = rows.copy()
    for head, guess in zip(out, guesses or [None] * len(rows), strict=True):
        for first in range(PAGE, len(head), PAGE):
            page = head[first : first + PAGE]
            page[:] = _page_back(side, page, name, None if guess is None else guess[first : first + PAGE])
    return out


def _pages(n_tokens: int) -> list[int]:
    """First tokens of the pages that errors are measured on, spread evenly; the first page stays F16 in use."""
    pages = np.linspace(1, n_tokens // PAGE - 1, ERROR_PAGES).astype(int)
    return [int(p) * PAGE for p in pages]


def stored_values(rows: Rows, bits: int) -> NDArray[np.float32]:
    """What a layer with own codes stores of its values, [head][token][e], in the rotated space."""
    side = value_side(bits)
    eye = np.eye(rows.shape[2], dtype=np.float32)

    def page(x: NDArray[np.float16]) -> NDArray[np.float32]:
        return codec.predict_v(side, x.shape[1], *codec.seal_v(side, x), eye).T

    return np.stack([np.concatenate([page(h[i : i + PAGE]) for i in range(0, len(h), PAGE)]) for h in rows])


@dataclass(frozen=True)
class MapFit:
    value_map: ValueMap
    guesses: list[Guess]  # of each head


def _solved(u: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float16]:
    """The matrix that makes y [token][e] of u [token][e] with least squared error, and is not large for nothing."""
    gram = u.T @ u
    ridge = RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram), dtype=np.float32)
    return np.linalg.solve(gram + ridge, u.T @ y).astype(np.float16)


def fit_map(stored: NDArray[np.float32], rows: Rows) -> MapFit:
    """The map that predicts a layer's values, rows [head][token][e], from what its source stores of its own.

    Each head takes the one source head that leaves least over.  Guesses, for errors to be measured on, are what a map
    makes of a page that was fitted to every other page.
    """
    heads, weights = [], []
    guesses: list[Guess] = []
    odd = np.arange(rows.shape[1]) // PAGE % 2 == 1
    for x in rows:
        y = codec.hadamard(x.astype(np.float32))
        fits = []
        for h, u in enumerate(stored):
            guess = np.empty_like(y)
            for half in (odd, ~odd):
                guess[half] = u[half] @ _solved(u[~half], y[~half]).astype(np.float32)
            fits.append((float(((y - guess) ** 2).sum()), h, guess))
        _, head, guess = min(fits, key=lambda fit: fit[0])
        heads.append(head)
        weights.append(_solved(stored[head], y).astype("<f2").tobytes())
        guesses.append(guess)
    return MapFit(ValueMap(tuple(heads), b"".join(weights)), guesses)
