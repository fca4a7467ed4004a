"""Files that are compiled for instructions which not every CPU has give the linker nothing for others to use.

A template or an inline function that is compiled in several files is kept once, and from any of them: from one with
AVX-512, it stops a CPU without.  Optimised code hides that, since little is left that is not in line.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from support import remote

# what a set is entered by
ENTRY = re.compile(r"xq::(kernels_\w+|attend_\w+\(xq::attention const&\))$")


def run(command: list[str], folder: Path) -> str:
    out = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-4000:]
    return out.stdout


def shared_symbols(nm: str, objects: list[Path]) -> list[str]:
    """What others could be linked with, besides the entries."""
    found = []
    for path in objects:
        for line in run([nm, "-C", "--defined-only", str(path)], path.parent).splitlines():
            kind, name = line[17:].split(" ", 1)
            if (kind.isupper() or kind in "wvu") and not ENTRY.match(name):
                found.append(f"{path.name}: {kind} {name}")
    return found


def compiled(folder: Path, level: str, options: list[str]) -> list[Path]:
    """Objects of the files that have instructions of their own, by the commands that CMake would use."""
    configure = ["cmake", "-G", "Ninja", "-S", remote.RUNNER, "-B", folder, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    remote.run([*configure, "-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={level}", *options])
    objects = []
    for entry in json.loads((folder / "compile_commands.json").read_text()):
        command = shlex.split(entry["command"])
        if any(word.startswith(("-mavx", "-march=")) for word in command):
            path = folder / (Path(entry["file"]).stem + ".o")
            command[command.index("-o") + 1] = str(path)
            run(command, Path(entry["directory"]))
            objects.append(path)
    return objects


@pytest.mark.parametrize(
    ("nm", "options", "least"),
    [
        pytest.param("nm", [], 3, id="here"),
        pytest.param(
            "aarch64-linux-gnu-nm",
            [f"-DCMAKE_TOOLCHAIN_FILE={remote.ROOT / 'native' / 'aarch64.cmake'}"],
            2,
            id="arm",
            marks=pytest.mark.arm,
        ),
    ],
)
@pytest.mark.parametrize("level", ["-O0", "-O1"])
def test_nothing_but_the_entries_is_shared(tmp_path: Path, nm: str, options: list[str], least: int, level: str) -> None:
    objects = compiled(tmp_path, level, options)
    assert len(objects) >= least
    assert shared_symbols(nm, objects) == []


def test_what_is_shared_is_found(tmp_path: Path) -> None:
    source = tmp_path / "shared.cpp"
    source.write_text("#include <algorithm>\nint smaller(int a, int b) { return std::min(a, b); }\n")
    run(["c++", "-O0", "-c", str(source)], tmp_path)
    found = shared_symbols("nm", [tmp_path / "shared.o"])
    assert [line.split(": ")[1][0] for line in found] == ["T", "W"]
