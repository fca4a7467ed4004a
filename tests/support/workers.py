"""Workers of llama.cpp's RPC for tests: processes that answer on a port, and what stands between them and a client."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from cffi import FFI

TESTS = str(Path(__file__).resolve().parent.parent)
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([TESTS, *sys.path])}


CPU, GPU = 0, 1
"""Types of devices, as ggml counts them."""


def serve(endpoint: str, threads: int, kind: int) -> None:
    """What rpc-server does, with the first device of a type; never returns."""
    from xquant_gguf import fork, native

    _, lib = fork.load()
    ffi = FFI()
    ffi.cdef("void ggml_backend_rpc_start_server(const char *, const char *, size_t, size_t, void **);")
    rpc = ffi.dlopen(str(native.library_path("ggml-rpc")))
    devices = [lib.ggml_backend_dev_get(i) for i in range(lib.ggml_backend_dev_count())]
    first = next(device for device in devices if lib.ggml_backend_dev_type(device) == kind)
    array = ffi.new("void *[]", [ffi.cast("void *", int(ffi.cast("intptr_t", first)))])
    rpc.ggml_backend_rpc_start_server(endpoint.encode(), ffi.NULL, threads, 1, array)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Worker:
    endpoint: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def running(
    endpoint: str | None = None,
    threads: int = 1,
    prefix: Sequence[str] = (),
    log: Path | None = None,
    kind: int = CPU,
) -> Iterator[Worker]:
    """A worker, which must not have ended by itself.  prefix: of its command, such as `ip netns exec NAME`."""
    endpoint = endpoint or f"127.0.0.1:{free_port()}"
    command = [*prefix, sys.executable, "-m", "support.workers", endpoint, str(threads), str(kind)]
    with (
        open(log or os.devnull, "w") as file,
        subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=file) as process,
        ExitStack() as ends,
    ):
        try:
            assert process.stdout
            lines = iter(process.stdout.readline, b"")
            assert any(b"transport" in line for line in lines), "the worker did not start"
            rest = threading.Thread(target=lambda: [None for _ in lines], daemon=True)
            rest.start()
            ends.callback(rest.join)  # at the end of what the worker says: else it is closed while it is read
            if not prefix:
                _wait(endpoint)
            else:
                time.sleep(1)
            worker = Worker(endpoint, process)
            yield worker
            assert process.poll() in (None, -9), "the worker ended by itself"
        finally:
            process.kill()


def _wait(endpoint: str) -> None:
    host, port = endpoint.split(":")
    for _ in range(100):
        try:
            socket.create_connection((host, int(port))).close()
            return
        except OSError:
            time.sleep(0.05)


@dataclass
class Proxy:
    """Stands before a worker and counts bytes; answer: what it makes of the first answer of a connection."""

    worker: str
    answer: Callable[[bytes], bytes] = lambda data: data
    endpoint: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    n_bytes: int = 0
    _ends: list[socket.socket] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Proxy:
        host, port = self.endpoint.split(":")
        self._listener = socket.create_server((host, int(port)))
        self._run(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        """Both ends see a connection that is closed."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in (self._listener, *self._ends):
            end.close()

    def _run(self, function: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=function, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            host, port = self.worker.split(":")
            worker = socket.create_connection((host, int(port)))
            for end in (client, worker):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._ends += [client, worker]
            self._run(self._pass, client, worker, False)
            self._run(self._pass, worker, client, True)

    def _pass(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        first = answers
        while True:
            try:
                data = source.recv(1 << 20)
                if not data:
                    break
                while first and len(data) < 36:
                    data += source.recv(36 - len(data))
                self.n_bytes += len(data)  # before anybody can act on them
                target.sendall(self.answer(data) if first else data)
            except OSError:
                break
            first = False
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def says(at: int, value: int) -> Callable[[bytes], bytes]:
    """A worker that says another byte of its first answer: major, minor, patch, and what xquant_worker() gives."""
    return lambda data: data[: 8 + at] + bytes([value]) + data[9 + at :]


COMPUTE = 16  # GGML_TENSOR_FLAG_COMPUTE


class Stranger:
    """A client that sends what it likes."""

    HELLO, ALLOC, BASE, GRAPH, COUNT = 14, 0, 3, 10, 15

    def __init__(self, endpoint: str) -> None:
        host, port = endpoint.split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=60)
        self.ask(self.HELLO, bytes(24))

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, command: int, data: bytes) -> None:
        self.socket.sendall(struct.pack("<BQ", command, len(data)) + data)

    def ask(self, command: int, data: bytes) -> bytes:
        """The answer; empty: the worker closed the connection."""
        self.send(command, data)
        size = self._read(8)
        return self._read(struct.unpack("<Q", size)[0]) if size else b""

    def _read(self, n: int) -> bytes:
        out = b""
        while len(out) < n:
            try:
                part = self.socket.recv(n - len(out))
            except ConnectionError:
                part = b""
            if not part:
                return b""
            out += part
        return out

    def alloc(self, size: int) -> tuple[int, int]:
        """A buffer: its handle and its base."""
        handle = struct.unpack("<QQ", self.ask(self.ALLOC, struct.pack("<IQ", 0, size)))[0]
        return handle, struct.unpack("<Q", self.ask(self.BASE, struct.pack("<Q", handle)))[0]

    def is_answered(self) -> bool:
        return len(self.ask(self.COUNT, b"")) == 4


def rpc_tensor(
    number: int,
    kind: int,
    ne: Sequence[int],
    nb: Sequence[int],
    buffer: int = 0,
    data: int = 0,
    op: int = 0,
    params: bytes = b"",
    sources: Sequence[int] = (),
) -> bytes:
    """A tensor as the protocol has it."""
    return struct.pack(
        "<QIQ4I4II64si10QQQQ64si", number, kind, buffer, *ne, *nb, op, params.ljust(64, b"\0"), COMPUTE,
        *sources, *[0] * (10 - len(sources)), 0, 0, data, b"", 0,
    )  # fmt: skip


def graph(node: int, tensors: Sequence[bytes]) -> bytes:
    return struct.pack("<IIQI", 0, 1, node, len(tensors)) + b"".join(tensors)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
