"""What the first NVIDIA GPU is called, and how fast its memory copies: what the GB/s of bench can be held against.

usage: gpu_memory.py
"""

from __future__ import annotations

import ctypes
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from support import gpu

COPY_BYTES = 1 << 28


def name() -> str:
    """The GPU's name."""
    text = ctypes.create_string_buffer(128)
    gpu.check(gpu.driver().cuDeviceGetName(text, len(text), 0))
    return text.value.decode()


def copy_speed() -> float:
    """Bytes per second, read and written, of a copy: the median of ten."""
    cuda, size = gpu.driver(), ctypes.c_size_t(COPY_BYTES)
    at, events, times = [ctypes.c_uint64() for _ in range(2)], [ctypes.c_void_p() for _ in range(2)], []
    for pointer, event in zip(at, events, strict=True):
        gpu.check(cuda.cuMemAlloc_v2(ctypes.byref(pointer), size))
        gpu.check(cuda.cuEventCreate(ctypes.byref(event), 0))
    for _ in range(10):
        milliseconds = ctypes.c_float()
        gpu.check(cuda.cuEventRecord(events[0], None))
        gpu.check(cuda.cuMemcpyDtoDAsync_v2(at[0], at[1], size, None))
        gpu.check(cuda.cuEventRecord(events[1], None))
        gpu.check(cuda.cuEventSynchronize(events[1]))
        gpu.check(cuda.cuEventElapsedTime(ctypes.byref(milliseconds), *events))
        times.append(milliseconds.value)
    for pointer, event in zip(at, events, strict=True):
        gpu.check(cuda.cuMemFree_v2(pointer))
        gpu.check(cuda.cuEventDestroy_v2(event))
    return 2 * COPY_BYTES / statistics.median(times) * 1e3


if __name__ == "__main__":
    print(f"{name()}, copies at {copy_speed() / 1e9:.0f} GB/s")
