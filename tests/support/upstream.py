"""llama.cpp's own test programs, built from the pinned source and linked against the fork (tests/upstream)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from support.alone import alone
from xquant_gguf import native

ROOT = Path(__file__).resolve().parent.parent.parent
# beside the interpreter first: a virtual environment that was not activated
PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))


def _run(command: Sequence[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder; both of its outputs are one."""
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": PATH},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=1200,
        check=False,
    )


def build(folder: Path) -> Path:
    """Makes the source with its insertions and builds the programs in folder; where they lie."""
    source, programs = folder / "llama.cpp", folder / "programs"
    configure: list[str | Path] = ["cmake", "-G", "Ninja", "-S", ROOT / "tests" / "upstream", "-B", programs]
    configure += [f"-DLLAMA={source}", f"-DLIBRARIES={native.LIBRARY_DIR}"]
    if ccache := shutil.which("ccache"):
        configure.append(f"-DCMAKE_CXX_COMPILER_LAUNCHER={ccache}")
    prepare: list[str | Path] = [sys.executable, ROOT / "tools" / "prepare_llama.py", folder]
    prepare.append(ROOT / "native" / "llama" / "version.json")
    with alone(folder):
        for command in (prepare, configure, ["ninja", "-C", str(programs)]):
            out = _run(command, ROOT)
            assert out.returncode == 0, out.stdout[-6000:]
    return programs


@dataclass(frozen=True)
class Run:
    """What a program left: its exit status, and all that it said."""

    status: int
    text: str

    @cached_property
    def sealed(self) -> list[int]:
        """Sealed pages of each XQuant cache that it had, when that cache ended (harness.cpp)."""
        return [int(n) for n in re.findall(r"harness: xquant cache with (\d+) pages sealed", self.text)]

    @property
    def refused(self) -> bool:
        """A context could not be made: the program was ended there."""
        return "harness: no context" in self.text

    @cached_property
    def parts(self) -> dict[int, str]:
        """What a program that numbers its tests said in each."""
        pieces = re.split(r"=== Test (\d+): ", self.text)
        return {int(n): piece for n, piece in zip(pieces[1::2], pieces[2::2], strict=True)}


def run(program: Path, arguments: Sequence[str | Path], folder: Path) -> Run:
    """Runs it to its end in a folder of the test's."""
    out = _run([program, *arguments], folder)
    return Run(out.returncode, re.sub(r"\x1b\[[\d;]*m", "", out.stdout))


def make_models(folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """Random models that llama.cpp's own generator writes: one for each architecture and kind, or those of names."""
    architectures = {name.rpartition("-")[0] for name in names}
    only = ("-a", f"^({'|'.join(sorted(architectures))})$") if names else ()
    out = run(build(ROOT / "build" / "upstream") / "test-llama-archs", (*only, "-s", "1", "-o", folder), folder)
    assert out.status == 0, out.text[-4000:]
    return [path for path in sorted(folder.glob("*.gguf")) if not names or path.stem in names]
