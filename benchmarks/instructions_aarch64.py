"""Instructions of 64-bit ARM that attention over a sealed page takes, for each kernel set: a stand-in for its speed.

An emulator cannot time.  This counts what one more sealed page adds to one call, all instructions of the program
included, with qemu's trace of single steps, and prints it per cached token and KV head.  A count says nothing of
memory, or of how many instructions run at once.

usage: PYTHONPATH=tests python benchmarks/instructions_aarch64.py   (needs what `make test-arm` needs)
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from support import emulated
from support.attention_cases import Case, Head
from xquant_gguf.plan import PAGE, Side

V = Side(2, 0, "lloyd", "log8", True)
PRESETS = {  # keys and values, as the presets store them
    "xquant": (Side(4, 128), V),
    "xquant-small": (Side(3, 128), V),
    "xquant-tiny": (Side(2, 128), Side(1, 0, "lloyd", "log8", True)),
}
SHAPES = {"Qwen2.5-1.5B (6 rows a KV head, 128 wide)": (6, 128), "Llama-3-8B (4 rows, 128 wide)": (4, 128)}
SETS = ("scalar", "neon", "neon-dotprod", "neon-i8mm")


def steps(runner: Path, kernels: str, case: Case) -> int:
    """Instructions of a process that makes the call once."""
    strings = [b"force", kernels.encode(), *emulated.attend(case, Head(case), ())]
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder, "calls")
        asked.write_bytes(b"".join(emulated.number(len(part)) + part for part in strings))
        trace = ["-singlestep", "-d", "exec,nochain", "-D", "/dev/stdout"]
        command = ["qemu-aarch64-static", "-cpu", "max", "-L", emulated.SYSTEM, *trace, runner, asked, "/dev/null"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            n = 0
            while block := process.stdout.read(1 << 20):
                n += block.count(b"Trace ")
    assert process.returncode == 0
    return n


def main() -> None:
    runner = emulated.build(emulated.ROOT / "build" / "aarch64")
    for shape, (n_rows, width) in SHAPES.items():
        for preset, (k, v) in PRESETS.items():
            counts = {}
            for kernels in SETS:
                one, two = (
                    steps(runner, kernels, Case(width, width, k, v, (-1,) * n, n_rows, masked=False)) for n in (1, 2)
                )
                counts[kernels] = (two - one) / PAGE
            line = ", ".join(f"{name} {n:,.0f} ({counts['scalar'] / n:.1f} x)" for name, n in counts.items())
            print(f"{shape}, {preset}: {line}", flush=True)


if __name__ == "__main__":
    main()
