"""Instructions of 64-bit ARM that attention over a sealed page takes, for each kernel set: a stand-in for its speed.

An emulator cannot time.  This counts what one more sealed page adds to one call, all instructions of the program
included, with qemu's trace of single steps, and prints it per cached token and KV head.  A count says nothing of
memory, or of how many instructions run at once.

usage: PYTHONPATH=tests python benchmarks/instructions_aarch64.py   (needs what `make test-arm` needs)
"""

from __future__ import annotations

import struct
import subprocess
import tempfile
from typing import Any

import numpy as np

from support import remote
from support.pages_of_codes import Content, V, random_rows
from support.storage import SEALED
from xquant_gguf.plan import PAGE, Layer, Side

PRESETS = {  # keys and values, as the presets store them
    "xquant": Layer(Side(4, 128), V),
    "xquant-small": Layer(Side(3, 128), V),
    "xquant-tiny": Layer(Side(2, 128), Side(1, 0, "lloyd", "log8", True)),
}
SHAPES = {"Qwen2.5-1.5B (6 rows a KV head, 128 wide)": (6, 128), "Llama-3-8B (4 rows, 128 wide)": (4, 128)}
SETS = ("scalar", "neon", "neon-dotprod", "neon-i8mm")


class Recorder(remote.Runner):
    """Keeps the commands for the runner, which nobody answers."""

    def __init__(self) -> None:
        self.commands = b""

    def ask(self, *command: bytes | int, gives: bool = False) -> bytes:
        parts = [struct.pack("<q", part) if isinstance(part, int) else part for part in command]
        self.commands += b"".join(struct.pack("<Q", len(part)) + part for part in parts)
        return bytes(int(command[2]) if command[0] == b"read" else 8 if gives else 0)


class Recording(remote.Remote):
    def start(self, command: list[Any], asked: str) -> remote.Runner:
        return Recorder()

    def verb(self, verb: str, store: Any, args: Any, n_threads: int = 1) -> None:
        self.call(verb, store, args, 1)


def steps(kernels: str, layer: Layer, n_rows: int, width: int, n_pages: int) -> int:
    """Instructions of a process that attends once to n_pages."""
    on, rng = Recording("arm", [], kernels), np.random.default_rng(0)
    storage = Content(layer, random_rows(rng, 1, 1, 1, width)).put(on, n_pages)
    storage.attend(rng.standard_normal((1, 1, n_rows, width), np.float32), [[SEALED] * n_pages])
    assert isinstance(on.runner, Recorder)
    with tempfile.TemporaryFile() as commands:
        commands.write(on.runner.commands)
        commands.seek(0)
        trace = ["-singlestep", "-d", "exec,nochain", "-D", "/dev/stderr"]
        with subprocess.Popen(
            remote.qemu("max", *trace), stdin=commands, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            assert process.stderr is not None
            n = 0
            while block := process.stderr.read(1 << 20):
                n += block.count(b"Trace ")
    assert process.returncode == 0
    return n


def main() -> None:
    for shape, (n_rows, width) in SHAPES.items():
        for preset, layer in PRESETS.items():
            counts = {}
            for kernels in SETS:
                one, two = (steps(kernels, layer, n_rows, width, n) for n in (1, 2))
                counts[kernels] = (two - one) / PAGE
            line = ", ".join(f"{name} {n:,.0f} ({counts['scalar'] / n:.1f} x)" for name, n in counts.items())
            print(f"{shape}, {preset}: {line}", flush=True)


if __name__ == "__main__":
    main()
