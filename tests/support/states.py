"""Saved states that were forged: with a checksum that fits, as whoever forges one would see to."""

from __future__ import annotations

import struct

MASK = 2**64 - 1


def checksum(data: bytes) -> int:
    """The hash of native/llama/xquant-hash.h."""
    value, whole = 0xCBF29CE484222325, len(data) // 8

    def mixed(word: int) -> int:
        product = (value ^ word) * 0x100000001B3 & MASK
        return product ^ product >> 32

    for word in struct.unpack_from(f"<{whole}Q", data):
        value = mixed(word)
    return mixed(int.from_bytes(data[whole * 8 :], "little") ^ len(data) << 56 & MASK)


def forged(state: bytes) -> bytes:
    """The state with the checksum of what stands in it; of another magic nobody asks for one."""
    start = state.find(b"XQS3")
    if start < 0:
        return state
    return state[:-8] + struct.pack("<Q", checksum(state[start:-8]))
