"""What the first NVIDIA GPU of this machine is called, and how fast its memory is; asked of the CUDA driver alone."""

from __future__ import annotations

import ctypes
import statistics
from typing import Any

COPY_BYTES = 1 << 28


def describe_gpu() -> tuple[str, float] | None:
    """Name and bytes per second, read and written, of a copy in its memory; None without a GPU or its driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, context, name = ctypes.c_int(), ctypes.c_void_p(), ctypes.create_string_buffer(128)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    _check(cuda.cuDeviceGetName(name, len(name), device))
    _check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    _check(cuda.cuCtxPushCurrent_v2(context))
    try:
        return name.value.decode(), _copy_speed(cuda)
    finally:
        _check(cuda.cuCtxPopCurrent_v2(ctypes.byref(context)))
        _check(cuda.cuDevicePrimaryCtxRelease_v2(device))


def _check(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"the CUDA driver returned {status}")


def _copy_speed(cuda: Any) -> float:
    """Median of ten copies."""
    at, size = [ctypes.c_uint64() for _ in range(2)], ctypes.c_size_t(COPY_BYTES)
    events, times = [ctypes.c_void_p() for _ in range(2)], []
    for pointer, event in zip(at, events, strict=True):
        _check(cuda.cuMemAlloc_v2(ctypes.byref(pointer), size))
        _check(cuda.cuEventCreate(ctypes.byref(event), 0))
    for _ in range(10):
        milliseconds = ctypes.c_float()
        _check(cuda.cuEventRecord(events[0], None))
        _check(cuda.cuMemcpyDtoDAsync_v2(at[0], at[1], size, None))
        _check(cuda.cuEventRecord(events[1], None))
        _check(cuda.cuEventSynchronize(events[1]))
        _check(cuda.cuEventElapsedTime(ctypes.byref(milliseconds), *events))
        times.append(milliseconds.value)
    for pointer, event in zip(at, events, strict=True):
        _check(cuda.cuMemFree_v2(pointer))
        _check(cuda.cuEventDestroy_v2(event))
    return 2 * COPY_BYTES / statistics.median(times) * 1e3
