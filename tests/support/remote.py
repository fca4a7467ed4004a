"""The verbs of libxquant in another process, tests/runner: for 64-bit ARM under qemu, Windows under wine, or here on
small stacks."""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import wheels
from support.alone import alone
from support.devices import CPU_GROUP_ROWS, Device, Refused
from support.wine import wine
from xquant_gguf import native

ROOT = Path(__file__).resolve().parent.parent.parent
RUNNER = ROOT / "tests" / "runner"
SYSTEM = "/usr/aarch64-linux-gnu"
# beside the interpreter first: a virtual environment that was not activated
PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
NEEDED = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64-static": "qemu-user-static",
    "cmake": "cmake",
    "ninja": "ninja-build",
}
AREA, AREA_BYTES = 0x1000000000, 1 << 30  # as in runner.cpp


def missing() -> list[str]:
    """Debian's names of the packages that would have to be installed for the emulator."""
    return [package for program, package in NEEDED.items() if shutil.which(program, path=PATH) is None]


def missing_for_windows() -> list[str]:
    """What would have to be installed to compile for Windows and to run it."""
    names = [f"apt-get install {name}" for name in ("wine", "cmake") if shutil.which(name, path=PATH) is None]
    return names if importlib.util.find_spec("ziglang") else [*names, "pip install ziglang"]


def run(command: list[Any], **variables: str) -> None:
    env = {**os.environ, "PATH": PATH, **variables}
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout[-4000:] + out.stderr[-4000:]


@lru_cache(maxsize=1)
def build_for_arm() -> Path:
    """Builds libxquant and the runner for aarch64; the path of the runner."""
    folder = ROOT / "build" / "aarch64"
    toolchain = ROOT / "native" / "aarch64.cmake"
    with alone(folder):
        run(["cmake", "-G", "Ninja", "-S", RUNNER, "-B", folder, f"-DCMAKE_TOOLCHAIN_FILE={toolchain}"])
        run(["ninja", "-C", folder])
    return folder / "runner"


@lru_cache(maxsize=1)
def build_for_windows() -> Path:
    """Builds libxquant and the runner for Windows, as wheels are built; the path of the runner."""
    folder = ROOT / "build" / "windows"
    with alone(folder):
        target = next(target for target in wheels.TARGETS if target.system == "Windows")
        wheels.write_compilers(folder / "zig", target)
        variables = wheels.toolchain_variables(target, folder / "zig")
        toolchain = f"-DCMAKE_TOOLCHAIN_FILE={wheels.TOOLCHAIN}"
        run(["cmake", "-G", "Ninja", "-S", RUNNER, "-B", folder, toolchain], **variables)
        run(["ninja", "-C", folder], **variables)
    return folder / "runner.exe"


@lru_cache(maxsize=1)
def build_here() -> Path:
    """The runner for this machine, with the package's own libxquant."""
    folder, library = Path(tempfile.mkdtemp(prefix="xquant-runner-")), native.library_path("xquant")
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", f"-I{library.parent}", RUNNER / "runner.cpp"]
    run([*command, "-o", folder / "runner", library, f"-Wl,-rpath,{library.parent}", "-pthread"])
    return folder / "runner"


def qemu(cpu: str, *options: str) -> list[Any]:
    """The command that runs the runner on an emulated CPU."""
    return ["qemu-aarch64-static", "-cpu", cpu, "-L", SYSTEM, *options, build_for_arm()]


def on_windows() -> list[Any]:
    """The command that runs the runner for Windows."""
    return wine(build_for_windows())


class Runner:
    """A process of the runner.  kernels: XQUANT_KERNELS."""

    def __init__(self, command: list[Any], kernels: str = "") -> None:
        env = {**os.environ, "XQUANT_KERNELS": kernels}
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        atexit.register(self.close)

    def ask(self, *command: bytes | int, gives: bool = False) -> bytes:
        """One command; what it gives, if it gives something.  Refused with its message if it fails."""
        assert self.process.stdin is not None
        for part in command:
            raw = struct.pack("<q", part) if isinstance(part, int) else part
            self.process.stdin.write(struct.pack("<Q", len(raw)) + raw)
        self.process.stdin.flush()
        (status,) = struct.unpack("<q", self._take())
        if status < 0:
            raise Refused(self._take().decode())
        return self._take() if gives else b""

    def _take(self) -> bytes:
        assert self.process.stdout is not None
        head = self.process.stdout.read(8)
        assert len(head) == 8, f"the runner ended with status {self.process.wait()}"
        return self.process.stdout.read(struct.unpack("<Q", head)[0])

    def close(self) -> None:
        """Ends the process; again: nothing."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait() == 0

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Remote(Device):
    """A runner with one of its kernel sets in force; asked: XQUANT_KERNELS instead."""

    group_rows = CPU_GROUP_ROWS

    def __init__(self, name: str, command: list[Any], kernels: str, asked: str = "") -> None:
        super().__init__()
        self.name, self.kernels = name, kernels
        self.runner = self.start(command, asked)
        if not asked:
            self.runner.ask(b"force", kernels.encode())
        self.sets = self.runner.ask(b"available", gives=True).decode().split(",")
        self.end, self.released = AREA, dict[int, list[int]]()
        self.sizes: dict[int, int] = {}
        self.stack = 0  # most bytes that a thread of the last verb used

    def start(self, command: list[Any], asked: str) -> Runner:
        return Runner(command, asked)

    def alloc(self, n: int) -> int:
        n = -(-n // 4096) * 4096
        if same := self.released.get(n):
            address = same.pop()
        else:
            address, self.end = self.end, self.end + n
            assert self.end <= AREA + AREA_BYTES, "the runner's memory is used up"
        self.sizes[address] = n
        return address

    def free(self, address: int) -> None:
        self.released.setdefault(self.sizes.pop(address), []).append(address)

    def write(self, address: int, data: bytes) -> None:
        self.runner.ask(b"write", address, data)

    def read(self, address: int, n: int) -> bytes:
        return self.runner.ask(b"read", address, n, gives=True)

    def call(self, verb: str, store: Any, args: Any, n_threads: int) -> None:
        ffi, _ = native.load()
        structs = [b"" if c == ffi.NULL else bytes(ffi.buffer(c)) for c in (store, args)]
        used = self.runner.ask(b"verb", verb.encode(), n_threads, *structs, gives=True)
        (self.stack,) = struct.unpack("<q", used)

    def attend_kernel(self, store: Any) -> str:
        ffi, _ = native.load()
        return self.runner.ask(b"attend_kernel", bytes(ffi.buffer(store)), gives=True).decode()

    def calls(self) -> dict[str, int]:
        return {
            name: struct.unpack("<q", self.runner.ask(b"calls", name.encode(), gives=True))[0] for name in self.sets
        }
