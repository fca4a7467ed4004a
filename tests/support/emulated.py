"""Calls to libxquant on another CPU: cross-built by tests/runner, run with qemu's user mode emulation."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xquant_gguf import native
from xquant_gguf.plan import PAGE, Side, side_to_c

ROOT = Path(__file__).resolve().parent.parent.parent
SYSTEM = "/usr/aarch64-linux-gnu"
# beside the interpreter first: a virtual environment that was not activated
PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
NEEDED = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64-static": "qemu-user-static",
    "cmake": "cmake",
    "ninja": "ninja-build",
}

Call = tuple[bytes, ...]
Result = tuple[int, list[bytes]]


def missing() -> list[str]:
    """Debian's names of the packages that would have to be installed."""
    return [package for program, package in NEEDED.items() if shutil.which(program, path=PATH) is None]


def build(folder: Path) -> Path:
    """Builds libxquant and the runner for aarch64; the path of the runner."""
    toolchain = ROOT / "native" / "aarch64.cmake"
    configure = ["cmake", "-G", "Ninja", "-S", ROOT / "tests" / "runner", "-B", folder]
    for command in ([*configure, f"-DCMAKE_TOOLCHAIN_FILE={toolchain}"], ["ninja", "-C", folder]):
        out = subprocess.run(command, env={**os.environ, "PATH": PATH}, capture_output=True, text=True, check=False)
        assert out.returncode == 0, out.stdout[-4000:] + out.stderr[-4000:]
    return folder / "runner"


def run(runner: Path, cpu: str, calls: list[Call], kernels: str = "") -> list[Result]:
    """Status and outputs of each call, all in one process on that CPU of qemu's.  kernels: XQUANT_KERNELS."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "calls"), Path(folder, "results")
        strings = [part for call in calls for part in call]
        asked.write_bytes(b"".join(struct.pack("<Q", len(part)) + part for part in strings))
        command = ["qemu-aarch64-static", "-cpu", cpu, "-L", SYSTEM, runner, asked, answered]
        env = {**os.environ, "XQUANT_KERNELS": kernels}
        out = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert out.returncode == 0, f"exit status {out.returncode}: {out.stderr[-2000:]}"
        rest = memoryview(answered.read_bytes())

    def take() -> bytes:
        nonlocal rest
        (n,) = struct.unpack("<Q", rest[:8])
        part, rest = bytes(rest[8 : 8 + n]), rest[8 + n :]
        return part

    n_outputs = {b"force": 0, b"calls": 0, b"seal_k": 2, b"seal_v": 2}
    results = []
    for call in calls:
        (status,) = struct.unpack("<q", take())
        results.append((status, [take() for _ in range((status < 0) + n_outputs.get(call[0], 1))]))
    assert not rest
    return results


def raw(array: NDArray[Any] | bytes | None) -> bytes:
    return b"" if array is None else bytes(array) if isinstance(array, bytes) else array.tobytes()


def number(n: int) -> bytes:
    return struct.pack("<q", n)


def side_bytes(side: Side) -> bytes:
    ffi, _ = native.load()
    c = ffi.new("xq_side *")
    side_to_c(c, side, "side")
    return bytes(ffi.buffer(c))


def seal(
    name: str,
    side: Side,
    rows: NDArray[np.float16],
    sizes: tuple[int, int],
    valid: NDArray[np.bool_] | None = None,
    owner: bytes | None = None,
    predicted: NDArray[np.float32] | None = None,
) -> Call:
    """name: k or v; sizes: bytes of codes and of parameters."""
    words = np.packbits(np.ones(PAGE, bool) if valid is None else valid, bitorder="little")
    numbers = (number(rows.shape[1]), *(number(size) for size in sizes))
    arrays = (raw(rows), raw(words), raw(owner), raw(predicted))
    return (f"seal_{name}".encode(), side_bytes(side), *numbers, *arrays)


def unseal(
    name: str, side: Side, width: int, codes: bytes, param: bytes, predicted: NDArray[np.float32] | None = None
) -> Call:
    return (f"unseal_{name}".encode(), side_bytes(side), number(width), codes, param, raw(predicted))


def predict_v(source: Side, e: int, codes: bytes, param: bytes, weight: NDArray[np.float32]) -> Call:
    return (b"predict_v", side_bytes(source), number(e), codes, param, raw(weight))


def attend(case: Any, head: Any, parts: tuple[int, ...]) -> Call:
    """A case of test_attention.py and its arrays; parts: page numbers where the range is cut."""
    ffi, _ = native.load()
    a = ffi.new("xq_attention *")
    a.d, a.e, a.n_rows = case.d, case.e, case.n_rows
    side_to_c(a.k, case.k, "k")
    side_to_c(a.v, case.v, "v")
    a.k_code_bits, a.v_code_bits = case.k.bits, case.v.bits
    a.k_codes_stride, a.v_codes_stride = (c.strides[0] for c in head.codes)
    a.k_param_stride, a.v_param_stride = (c.strides[0] for c in head.params)
    a.scale, a.softcap = 1 / np.sqrt(case.d), case.softcap
    source, weight = (None, None), None
    if case.source is not None:
        a.mapped = 1
        side_to_c(a.source, case.source, "source")
        source, weight = head.source, head.weight
        a.source_codes_stride, a.source_param_stride = (x.strides[0] for x in source)
    edges = np.array([0, *parts, len(case.states)], np.int64)
    arrays = (
        edges, np.float32(case.sink), head.codes[0], head.params[0], head.codes[1], head.params[1], *source,
        *head.windows, np.array(case.states, np.int32), head.q, np.full(case.n_rows, case.slope, np.float32), weight,
        head.mask,
    )  # fmt: skip
    return (b"attend", bytes(ffi.buffer(a)), *(raw(x) for x in arrays))
