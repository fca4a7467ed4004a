"""Heads of GGUF files whose counts, sizes and alignments lie, and what GGUFFile says of each."""

from __future__ import annotations

import struct

from gguf import GGUFValueType


def head(n_tensors: int = 0, n_keys: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys) + rest + bytes(64)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def alignment(value: int) -> bytes:
    return head(n_keys=1, rest=text(b"general.alignment") + struct.pack("<II", GGUFValueType.UINT32, value))


LIES = {
    "keys": (head(n_keys=2**64 - 1), "keys, more than fit"),
    "tensors": (head(n_tensors=2**63), "tensors, more than fit"),
    "length of a string": (head(n_keys=1, rest=struct.pack("<Q", 2**64 - 1)), "bytes in a string, more than fit"),
    "length of a value": (
        head(n_keys=1, rest=text(b"a") + struct.pack("<IQ", GGUFValueType.STRING, 65)),
        "65 bytes in a string, more than fit",
    ),
    "length of an entry": (
        head(n_keys=1, rest=text(b"a") + struct.pack("<IIQQ", GGUFValueType.ARRAY, GGUFValueType.STRING, 1, 2**63)),
        "bytes in a string, more than fit",
    ),
    "number of strings": (
        head(n_keys=1, rest=text(b"a") + struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.STRING, 2**61)),
        "strings in a, more than fit",
    ),
    "length of an array": (
        head(n_keys=1, rest=text(b"a") + struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.UINT64, 2**61)),
        "numbers in a, more than fit",
    ),
    "dimensions": (head(n_tensors=1, rest=text(b"t") + struct.pack("<I", 2**32 - 1)), "dimensions of a tensor, more"),
    "alignment 0": (alignment(0), "general.alignment 0, must be a power of two"),
    "alignment 3": (alignment(3), "general.alignment 3, must be a power of two"),
}
