"""The head of a GGUF file: where each key and the list of tensors lie, and the values of keys.

gguf.GGUFReader makes one array for each entry of an array, and loops for ever over a count that the file cannot hold;
here every length is compared with the file's before it is used, and nothing is read that nobody asks for.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
NUMBERS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True)
class Entry:
    """One key: its type, for arrays that of the entries (sub) and their number, and where it lies.

    start and end are those of the whole key, name included; at: its first value.
    """

    type: GGUFValueType
    sub: GGUFValueType | None
    count: int
    start: int
    at: int
    end: int


class GGUFFile:
    """Keys and layout of a GGUF file; ValueError names the file and what is wrong with it.

    keys: in the file's order.  tensors: where the list of tensors starts and ends.  data: where their data start.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._bytes: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as a GGUF file: {error}") from error
        self._size = len(self._bytes)
        self._at = 0
        if self._take(4) != MAGIC:
            raise self._bad("does not start with GGUF")
        self.version = self._number("<I")
        if self.version not in VERSIONS:
            raise self._bad(f"has GGUF version {self.version}, must be one of {VERSIONS} and little-endian")
        self.n_tensors, n_keys = self._number("<Q"), self._number("<Q")
        self.keys: dict[str, Entry] = {}
        for _ in range(self._bounded(n_keys, 13, "keys")):
            self._read_key()
        start = self._at
        self._tensors = [self._skip_tensor() for _ in range(self._bounded(self.n_tensors, 24, "tensors"))]
        self.tensors = (start, self._at)
        self.alignment = DEFAULT_ALIGNMENT
        if "general.alignment" in self.keys:
            alignment = self.value("general.alignment")
            if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
                raise self._bad(f"has general.alignment {alignment!r}, must be a power of two")
            self.alignment = alignment
        self.data = self._at + -self._at % self.alignment

    def value(self, name: str) -> Any:
        """A number, a string, a list of strings, or an array of numbers."""
        entry = self.keys[name]
        self._at = entry.at
        if entry.type == GGUFValueType.ARRAY:
            if entry.sub == GGUFValueType.STRING:
                return [self._text() for _ in range(entry.count)]
            assert entry.sub is not None
            kind = np.dtype(NUMBERS[entry.sub])
            return np.frombuffer(self._bytes, kind, entry.count, entry.at)
        if entry.type == GGUFValueType.STRING:
            return self._text()
        return np.frombuffer(self._bytes, NUMBERS[entry.type], 1, entry.at)[0].item()

    def span(self, first: int, end: int) -> bytes:
        """Bytes of the file."""
        return bytes(self._bytes[first:end])

    def _bad(self, what: str) -> ValueError:
        return ValueError(f"{self.path} {what}")

    def _take(self, n: int) -> bytes:
        if n > self._size - self._at:
            raise self._bad(f"ends at byte {self._size}, within its metadata")
        self._at += n
        return bytes(self._bytes[self._at - n : self._at])

    def _number(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def _bounded(self, count: int, size: int, what: str) -> int:
        """count, if so many things of at least `size` bytes fit into the rest of the file."""
        if count > (self._size - self._at) // size:
            raise self._bad(f"says that it has {count} {what}, more than fit into its {self._size} bytes")
        return count

    def _text(self) -> str:
        raw = self._take(self._bounded(self._number("<Q"), 1, "bytes in a string"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self._bad(f"has a string that is not UTF-8: {error}") from error

    def _type(self) -> GGUFValueType:
        number = self._number("<I")
        if number >= len(GGUFValueType):
            raise self._bad(f"has a value of type {number}, must be less than {len(GGUFValueType)}")
        return GGUFValueType(number)

    def _read_key(self) -> None:
        start, name, kind, sub, count = self._at, self._text(), self._type(), None, 1
        if kind == GGUFValueType.ARRAY:
            sub, count = self._type(), self._number("<Q")
            if sub == GGUFValueType.ARRAY:
                raise self._bad(f"has an array of arrays, {name}")
        at, element = self._at, kind if sub is None else sub
        if element == GGUFValueType.STRING:
            for _ in range(self._bounded(count, 8, f"strings in {name}")):
                length = self._bounded(self._number("<Q"), 1, "bytes in a string")
                self._at += length
        else:
            size = np.dtype(NUMBERS[element]).itemsize
            self._at += size * self._bounded(count, size, f"numbers in {name}")
        if name in self.keys:
            raise self._bad(f"has the key {name} twice")
        self.keys[name] = Entry(kind, sub, count, start, at, self._at)

    def _skip_tensor(self) -> tuple[str, int, int]:
        """Name, number of values, type."""
        name = self._text()
        n_dims = self._bounded(self._number("<I"), 8, "dimensions of a tensor")
        n_values = math.prod(self._number("<Q") for _ in range(n_dims))
        kind = self._number("<I")
        self._take(8)
        return name, n_values, kind

    def tensor_bytes(self) -> dict[str, int]:
        """Bytes of every tensor; ValueError if one is of a type that gguf does not know."""
        out = {}
        for name, n_values, kind in self._tensors:
            try:
                block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            except ValueError as error:
                raise self._bad(f"has the tensor {name} of the unknown type {kind}") from error
            out[name] = n_values // block * size
        return out
