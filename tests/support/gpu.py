"""libxquant_cuda on the first GPU as a device of the kernel tests and benchmarks, by way of the CUDA driver."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

from support.devices import Device, Refused
from xquant_gguf import native


@cache
def driver() -> Any:
    """The CUDA driver, with the primary context of device 0 current."""
    cuda = ctypes.CDLL("libcuda.so.1")
    context, device = ctypes.c_void_p(), ctypes.c_int()
    check(cuda.cuInit(0))
    check(cuda.cuDeviceGet(ctypes.byref(device), 0))
    check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    check(cuda.cuCtxSetCurrent(context))
    return cuda


def check(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"the CUDA driver returned {status}")


@cache
def available() -> bool:
    try:
        driver()
        native.library_path("xquant_cuda")
    except (OSError, RuntimeError):
        return False
    return True


def count() -> int:
    """GPUs of this machine."""
    n = ctypes.c_int()
    check(driver().cuDeviceGetCount(ctypes.byref(n)))
    return n.value


def capability() -> tuple[int, int]:
    """Compute capability of the first GPU."""
    out = [ctypes.c_int(), ctypes.c_int()]
    for value, name in zip(out, (75, 76), strict=True):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        check(driver().cuDeviceGetAttribute(ctypes.byref(value), name, 0))
    return out[0].value, out[1].value


class Cuda(Device):
    """The first GPU; a verb runs on the default stream, and is waited for."""

    name = kernels = "cuda"

    def __init__(self) -> None:
        super().__init__()
        ffi, lib = native.load()
        self.group_rows = int(lib.XQ_CUDA_GROUP_ROWS)
        driver()
        self.library = ffi.dlopen(str(native.library_path("xquant_cuda")))
        self.backend = self.library.xq_cuda()

    def alloc(self, n: int) -> int:
        pointer = ctypes.c_uint64()
        check(driver().cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(max(n, 16))))
        return pointer.value

    def free(self, address: int) -> None:
        check(driver().cuMemFree_v2(ctypes.c_uint64(address)))

    def write(self, address: int, data: bytes) -> None:
        check(driver().cuMemcpyHtoD_v2(ctypes.c_uint64(address), data, ctypes.c_size_t(len(data))))

    def read(self, address: int, n: int) -> bytes:
        out = ctypes.create_string_buffer(n)
        check(driver().cuMemcpyDtoH_v2(out, ctypes.c_uint64(address), ctypes.c_size_t(n)))
        return out.raw

    def enqueue(self, verb: str, store: Any, args: Any, stream: int = 0) -> None:
        """Runs a verb on a CUDA stream without waiting for it; Refused if it is not even enqueued."""
        ffi, _ = native.load()
        at = ffi.new("xq_exec *", {"nth": 1, "cuda_stream": ffi.cast("void *", stream)})
        if getattr(self.backend, verb)(store, args, at) != 0:
            raise Refused(self.error())

    def synchronize(self) -> None:
        """Waits for all that was enqueued, copies to the GPU included."""
        check(driver().cuCtxSynchronize())

    def call(self, verb: str, store: Any, args: Any, n_threads: int) -> None:
        self.enqueue(verb, store, args)
        self.synchronize()

    def error(self) -> str:
        """The message of the last verb that was refused on this thread."""
        return str(native.load()[0].string(self.backend.error()).decode())

    def attend_kernel(self, store: Any) -> str:
        ffi, _ = native.load()
        name = self.backend.attend_kernel(store)
        if name == ffi.NULL:
            raise Refused(self.error())
        return str(ffi.string(name).decode())

    def calls(self) -> dict[str, int]:
        return {}


class Graph:
    """What `work(stream)` enqueues, captured once: replays cost the host next to nothing."""

    def __init__(self, work: Callable[[int], None]) -> None:
        cuda = driver()
        self.stream, graph, self.graph = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        check(cuda.cuStreamCreate(ctypes.byref(self.stream), 1))  # does not wait for the default stream
        check(cuda.cuStreamBeginCapture_v2(self.stream, 2))  # relaxed
        work(self.stream.value or 0)
        check(cuda.cuStreamEndCapture(self.stream, ctypes.byref(graph)))
        check(cuda.cuGraphInstantiateWithFlags(ctypes.byref(self.graph), graph, ctypes.c_ulonglong(0)))

    def milliseconds(self) -> float:
        """Time of one replay."""
        cuda, events, out = driver(), [ctypes.c_void_p() for _ in range(2)], ctypes.c_float()
        for event in events:
            check(cuda.cuEventCreate(ctypes.byref(event), 0))
        check(cuda.cuEventRecord(events[0], self.stream))
        check(cuda.cuGraphLaunch(self.graph, self.stream))
        check(cuda.cuEventRecord(events[1], self.stream))
        check(cuda.cuEventSynchronize(events[1]))
        check(cuda.cuEventElapsedTime(ctypes.byref(out), *events))
        for event in events:
            check(cuda.cuEventDestroy_v2(event))
        return out.value
