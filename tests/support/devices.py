"""Devices that the verbs of native/include/xquant.h run on, and memory there: what the kernel tests run over.

cpu-SET: libxquant in this process, with one kernel set.  arm-SET: libxquant for 64-bit ARM in a process under qemu;
wine-SET: for Windows, under wine (remote.py).  cuda: libxquant_cuda on a GPU (gpu.py).  A device hands out addresses;
memory has a margin on both sides, in which nothing may be written.
"""

from __future__ import annotations

import ctypes
import threading
from abc import ABC, abstractmethod
from functools import cache
from typing import Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from xquant_gguf import codec, native

MARGIN, GUARD, POISON = 256, 0xA5, 0xFF  # bytes; 0xFF: not-a-numbers
CPU_GROUP_ROWS = 64  # XQ_CPU_GROUP_ROWS


class Refused(Exception):
    """A verb did not return XQ_OK; the message is the backend's."""


class Device(ABC):
    """A backend and its memory."""

    name: str
    kernels: str  # the CPU's kernel set; "cuda"
    group_rows: int  # query rows of a KV head that share a counter of arrivals

    def __init__(self) -> None:
        self.buffers: WeakSet[Buffer] = WeakSet()
        self.ran: set[str] = set()  # kernel sets that the last verb called

    @abstractmethod
    def alloc(self, n: int) -> int:
        """Address of n bytes, a multiple of 256."""

    @abstractmethod
    def free(self, address: int) -> None: ...

    @abstractmethod
    def write(self, address: int, data: bytes) -> None: ...

    @abstractmethod
    def read(self, address: int, n: int) -> bytes: ...

    def guard(self, address: int, n: int) -> None:
        """Marks memory that no verb may touch."""
        self.write(address, bytes([GUARD]) * n)

    def is_untouched(self, address: int, n: int) -> bool:
        """Whether nothing was written there."""
        return self.read(address, n) == bytes([GUARD]) * n

    @abstractmethod
    def call(self, verb: str, store: Any, args: Any, n_threads: int) -> None:
        """Runs a verb to its end; Refused if it fails."""

    @abstractmethod
    def attend_kernel(self, store: Any) -> str:
        """Which kernel attend takes for a store."""

    @abstractmethod
    def calls(self) -> dict[str, int]:
        """How often kernels were called, by kernel set."""

    def verb(self, verb: str, store: Any, args: Any, n_threads: int = 2) -> None:
        """As call; proves that no kernels but this device's ran, and that they kept to the memory they were given."""
        before = self.calls()
        self.call(verb, store, args, n_threads)
        self.ran = {name for name, n in self.calls().items() if n > before[name]}
        assert self.ran <= {self.kernels}
        for buffer in list(self.buffers):
            buffer.check()


class Buffer:
    """Memory of a device, filled from an array or, for a number of bytes, with poison."""

    def __init__(self, device: Device, content: NDArray[Any] | int) -> None:
        self.device = device
        self.bytes = content if isinstance(content, int) else content.nbytes
        self.base = device.alloc(self.bytes + 2 * MARGIN)
        self.at = self.base + MARGIN
        data = bytes([POISON]) * self.bytes if isinstance(content, int) else np.ascontiguousarray(content).tobytes()
        device.write(self.at, data)
        for side in (self.base, self.at + self.bytes):
            device.guard(side, MARGIN)
        device.buffers.add(self)

    def set(self, content: NDArray[Any], offset: int = 0) -> None:
        """Overwrites it from byte `offset` on."""
        assert offset + content.nbytes <= self.bytes
        self.device.write(self.at + offset, np.ascontiguousarray(content).tobytes())

    def get(self, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        """Its first bytes as an array."""
        n = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert n <= self.bytes
        return np.frombuffer(self.device.read(self.at, n), dtype).reshape(shape).copy()

    def pointer(self, kind: str) -> Any:
        """Its address as a C pointer."""
        return native.load()[0].cast(kind + " *", self.at)

    def check(self) -> None:
        """Nothing was written beside it."""
        assert self.device.is_untouched(self.base, MARGIN), "written before a buffer"
        assert self.device.is_untouched(self.at + self.bytes, MARGIN), "written behind a buffer"

    def __del__(self) -> None:
        if hasattr(self, "base"):
            self.device.free(self.base)


class Cpu(Device):
    """libxquant in this process with a kernel set; each call by n_threads threads at once.

    With AddressSanitizer, margins may not even be read.
    """

    group_rows = CPU_GROUP_ROWS

    def __init__(self, kernels: str) -> None:
        super().__init__()
        self.name, self.kernels = f"cpu-{kernels}", kernels
        self.memory: dict[int, NDArray[np.uint8]] = {}
        self.backend = native.load()[1].xq_cpu()
        process, name = ctypes.CDLL(None), "__asan_%s_memory_region"
        self.poison, self.unpoison = (getattr(process, name % what, None) for what in ("poison", "unpoison"))

    def alloc(self, n: int) -> int:
        raw = np.empty(n + 256, np.uint8)
        address = int(raw.ctypes.data + -raw.ctypes.data % 256)
        self.memory[address] = raw
        return address

    def free(self, address: int) -> None:
        raw = self.memory.pop(address)
        if self.unpoison:
            self.unpoison(ctypes.c_void_p(raw.ctypes.data), ctypes.c_size_t(raw.nbytes))

    def guard(self, address: int, n: int) -> None:
        if self.poison:
            self.poison(ctypes.c_void_p(address), ctypes.c_size_t(n))
        else:
            super().guard(address, n)

    def is_untouched(self, address: int, n: int) -> bool:
        return self.poison is not None or super().is_untouched(address, n)

    def write(self, address: int, data: bytes) -> None:
        ffi, _ = native.load()
        ffi.memmove(ffi.cast("void *", address), data, len(data))

    def read(self, address: int, n: int) -> bytes:
        ffi, _ = native.load()
        return bytes(ffi.buffer(ffi.cast("char *", address), n))

    def call(self, verb: str, store: Any, args: Any, n_threads: int) -> None:
        ffi, _ = native.load()
        function, failed = getattr(self.backend, verb), []

        def run(ith: int) -> None:
            if function(store, args, ffi.new("xq_exec *", {"ith": ith, "nth": n_threads})) != 0:
                failed.append(ffi.string(self.backend.error()).decode())

        with codec.force_kernels(self.kernels):
            threads = [threading.Thread(target=run, args=(ith,)) for ith in range(n_threads)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if failed:
            assert len(failed) == n_threads, "some threads went on where others refused"
            raise Refused(failed[0])

    def attend_kernel(self, store: Any) -> str:
        ffi, _ = native.load()
        with codec.force_kernels(self.kernels):
            name = self.backend.attend_kernel(store)
        if name == ffi.NULL:
            raise Refused(native.error())
        return str(ffi.string(name).decode())

    def calls(self) -> dict[str, int]:
        return {name: codec.kernel_calls(name) for name in codec.kernel_sets()}


@cache
def device(name: str) -> Device:
    """The named device: cpu-scalar, cpu-avx2, ..., arm-neon, ..., wine-avx2, ..., cuda."""
    kind, _, kernels = name.partition("-")
    if kind in ("arm", "wine"):
        from support import remote

        return remote.Remote(name, remote.qemu("max") if kind == "arm" else remote.on_windows(), kernels)
    if kind == "cuda":
        from support import gpu

        return gpu.Cuda()
    return Cpu(kernels)
