"""What other caches' recipes give back of keys and values, in numpy: what side_by_side.py compares ours with.

A recipe takes tiles, pages of one KV head [tile][token][width], and gives back what it would read after storing them.
bits: what it stores of a value of a page, everything counted.  What a paper and its implementation leave open is chosen
as suits the recipe best; each says how.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from xquant_gguf import codec
from xquant_gguf.plan import PAGE

Tiles = NDArray[np.float32]  # [tile][PAGE][width]

F16 = 16


class Recipe(Protocol):
    """How keys and values are stored; name: "k" or "v"."""

    def back(self, tiles: Tiles, name: str) -> Tiles:
        """Tiles as they are read after they were stored."""
        ...

    def bits(self, width: int, name: str) -> float:
        """Bits of a value in a page of heads of a width."""
        ...


def rounded(x: Tiles) -> Tiles:
    """Numbers as F16 stores them."""
    return x.astype(np.float16).astype(np.float32)


def turned(tiles: Tiles) -> Tiles:
    """Each token's vector times the Hadamard matrix, which is its own inverse."""
    return codec.hadamard(tiles.reshape(-1, tiles.shape[2])).reshape(tiles.shape)


@dataclass(frozen=True)
class Exact:
    """Nothing is lost: what is left is the difference between kernels of attention."""

    def back(self, tiles: Tiles, name: str) -> Tiles:
        return tiles

    def bits(self, width: int, name: str) -> float:
        return F16


@dataclass(frozen=True)
class Blocks:
    """llama.cpp's q4_0 and q8_0, keys and values rotated by a Hadamard matrix, as llama.cpp does when it stores them.

    Blocks of 32 values of a token with an F16 scale: 4.5 and 8.5 bits.  q4_0's scale takes the largest value to -8.
    """

    code_bits: int
    SIZE = 32

    def back(self, tiles: Tiles, name: str) -> Tiles:
        x = turned(tiles).reshape(*tiles.shape[:2], -1, self.SIZE)
        if self.code_bits == 8:
            scale = np.abs(x).max(3, keepdims=True) / 127
            low, high = -127, 127
        else:
            scale = np.take_along_axis(x, np.abs(x).argmax(3)[..., None], 3) / -8
            low, high = -8, 7
        codes = np.clip(np.floor(x / np.where(scale == 0, 1, scale) + 0.5), low, high)
        return turned((codes * rounded(scale)).reshape(tiles.shape))

    def bits(self, width: int, name: str) -> float:
        return self.code_bits + F16 / self.SIZE


@dataclass(frozen=True)
class KVarN:
    """KVarN: a Hadamard matrix, then scales of tokens and channels that make all of them deviate alike, then rounding.

    Source: arXiv 2606.03458 and its implementation for vLLM.  A tile is 128 tokens of a head.  Scales of both axes are
    found in 16 rounds; the best of them counts.  Then keys have a minimum and a step for each channel, values for each
    token, in as many steps as there are codes.  Stored in F16: minimum and step times that axis's scale, and the other
    axis's scale, (2 d + 128) numbers for a tile of keys of width d, (d + 256) for values.

    2-bit codes leave out a share of the smallest and largest values of a row, which the implementation does if it is
    asked to: without, they do more harm to SmolLM2-135M.
    """

    k_bits: int
    v_bits: int
    rounds: int = 16
    least: float = math.exp(-0.3)
    """Of a scale, as in the implementation: without, 4-bit codes do more harm to SmolLM2-135M."""
    left_out: float = 0.01
    """On each side, of rows of 2 bits."""

    def back(self, tiles: Tiles, name: str) -> Tiles:
        x = turned(tiles)
        if name == "v":
            return turned(self._rows_back(x, self.v_bits))
        return turned(np.ascontiguousarray(self._rows_back(x.transpose(0, 2, 1), self.k_bits).transpose(0, 2, 1)))

    def _rows_back(self, x: Tiles, bits: int) -> Tiles:
        """x [tile][row][column], each row of a minimum and a step of its own."""
        column, row = self._scales(x)
        y = x / column / row
        low, high = _range(y, self.left_out if bits == 2 else 0)
        step = np.maximum((high - low) / (2**bits - 1), 1e-10)
        codes = np.clip(np.rint((y - low) / step), 0, 2**bits - 1)
        return (codes * rounded(step * row) + rounded(low * row)) * rounded(column)

    def _scales(self, x: Tiles) -> tuple[Tiles, Tiles]:
        """Scales [tile][1][column] and [tile][row][1]: dividing by them makes standard deviations most alike."""
        column = np.ones((len(x), 1, x.shape[2]), np.float32)
        row = np.ones((len(x), x.shape[1], 1), np.float32)
        best: tuple[Tiles, Tiles] = column, row
        least = _unevenness(x)
        y = x
        for _ in range(self.rounds):
            column = np.maximum(column * y.std(1, keepdims=True, ddof=1), self.least)
            y = x / column / row
            row = np.maximum(row * y.std(2, keepdims=True, ddof=1), self.least)
            y = x / column / row
            now = _unevenness(y)
            better = now <= least
            best = np.where(better, column, best[0]), np.where(better, row, best[1])
            least = np.minimum(now, least)
        return best

    def bits(self, width: int, name: str) -> float:
        bits, numbers = (self.k_bits, 2 * width + PAGE) if name == "k" else (self.v_bits, width + 2 * PAGE)
        return bits + F16 * numbers / (width * PAGE)


def _range(x: Tiles, left_out: float) -> tuple[Tiles, Tiles]:
    """The quantiles left_out and 1 - left_out of each row."""
    x = np.sort(x, axis=2)
    i, part = divmod(left_out * (x.shape[2] - 1), 1)
    first, last = int(i), -1 - int(i)
    low = (1 - part) * x[..., first, None] + part * x[..., first + 1, None]
    high = (1 - part) * x[..., last, None] + part * x[..., last - 1, None]
    return low, high


def _unevenness(x: Tiles) -> Tiles:
    """Largest over least standard deviation, of columns and of rows, added up; [tile][1][1]."""
    columns, rows = x.std(1, keepdims=True, ddof=1), x.std(2, keepdims=True, ddof=1)
    of_columns = columns.max(2, keepdims=True) / np.maximum(columns.min(2, keepdims=True), 1e-8)
    return of_columns + rows.max(1, keepdims=True) / np.maximum(rows.min(1, keepdims=True), 1e-8)


@dataclass(frozen=True)
class TurboQuant:
    """TurboQuant: a vector's norm, a rotation of its direction, and the best levels for coordinates of a random one.

    Source: arXiv 2504.19874 (the variant of least squared error) and the cache types turbo2, turbo3 and turbo4 of
    github.com/TheTom/llama-cpp-turboquant.  Levels are Lloyd-Max's for a coordinate of a random unit vector, whose
    density is (1 - x^2)^((d - 3) / 2).  The norm, in F16, is that which gives back the vector's length, as in the fork.
    random: the rotation is a random matrix, as in the paper; else random signs and a Hadamard matrix, as in the fork.

    Left out, since it would cost bits: what the fork adds to heads of less than 128 to make them 128, and turbo4's
    second number, which nothing reads.  keys: as the fork stores those of models with six query heads or more for a KV
    head, q8_0.
    """

    k_bits: int
    v_bits: int
    random: bool = False

    def back(self, tiles: Tiles, name: str) -> Tiles:
        bits = self.k_bits if name == "k" else self.v_bits
        if bits == 8:
            return Blocks(8).back(tiles, name)
        rotation, levels = _rotation(tiles.shape[2], self.random), codebook(bits, tiles.shape[2])
        norm = np.linalg.norm(tiles, axis=2, keepdims=True)
        y = tiles / np.maximum(norm, 1e-10) @ rotation
        y = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, y)]
        return rounded(norm / np.linalg.norm(y, axis=2, keepdims=True)) * y @ rotation.T

    def bits(self, width: int, name: str) -> float:
        bits = self.k_bits if name == "k" else self.v_bits
        return Blocks(8).bits(width, name) if bits == 8 else bits + F16 / width


@lru_cache
def _rotation(width: int, random: bool) -> NDArray[np.float32]:
    """A random orthogonal matrix, or a Hadamard matrix whose rows have random signs, the same each time."""
    x = np.random.default_rng(42).normal(size=(width, width))
    if random:
        return np.linalg.qr(x)[0].astype(np.float32)
    return np.sign(x[:, :1]).astype(np.float32) * codec.hadamard(np.eye(width, dtype=np.float32))


@lru_cache
def codebook(bits: int, width: int) -> NDArray[np.float32]:
    """The levels of least squared error for a coordinate of a random unit vector of a width, ascending."""
    x = np.linspace(-1, 1, 40002)[1:-1]
    density = (1 - x * x) ** ((width - 3) / 2)
    share = np.cumsum(density) / density.sum()
    levels = x[np.searchsorted(share, (np.arange(2**bits) + 0.5) / 2**bits)]
    for _ in range(1000):
        nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, x)
        levels = np.bincount(nearest, density * x) / np.bincount(nearest, density)
    return levels.astype(np.float32)
