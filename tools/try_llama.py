"""Try the fork on another release of llama-cpp-python, or on a folder of llama.cpp: does it move there by itself?

usage: try_llama.py VERSION | --source FOLDER_OR_SDIST   [--report]

Says for each insertion whether it holds, has moved, has become ambiguous or is lost.  If all hold, and without
--report, builds the fork in build/llama-VERSION and runs the oracle tests with it: the sdist's own Python bindings,
beside a copy of our package.  A bare llama.cpp folder has no bindings; those of the pinned release are used then.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cpp_places
import downloads
import insert
import llama_source
from insert import Insertion, Problem
from llama_source import Release

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("src", "include", "common", "ggml/include", "ggml/src", "tools")


@dataclass(frozen=True)
class Finding:
    """What became of an insertion: kind is `holds` or a problem's; and where it is, or why it cannot be made."""

    insertion: Insertion
    kind: str
    message: str


# -- the report


def report(tree: Path, table: list[Insertion]) -> list[Finding]:
    """What became of each insertion in a source tree."""
    return [look(tree, insertion) for insertion in table]


def look(tree: Path, insertion: Insertion) -> Finding:
    """What became of one insertion."""
    scanned = scan_file(tree / insertion.file)
    found = insert.locate(scanned, insertion) if scanned else Problem("lost", "the file does not exist")
    if not isinstance(found, Problem):
        return Finding(insertion, "holds", insertion.place)
    if found.kind == "lost" and insertion.place != insert.IN_FILE:
        for file in files_with(tree, insertion.place):
            other = scan_file(tree / file)
            if file != insertion.file and other and other.find(insertion.place):
                state = "without" if isinstance(insert.locate(other, insertion), Problem) else "with"
                return Finding(
                    insertion, "moved", f"{found.message}; {insertion.place} is in {file}, {state} its anchor"
                )
    return Finding(insertion, found.kind, found.message)


@functools.cache
def scan_file(path: Path) -> cpp_places.Scan | None:
    return cpp_places.scan(path.read_text(errors="replace")) if path.exists() else None


def files_with(tree: Path, place: str) -> Iterator[str]:
    """Files of the tree that mention the last name of a place."""
    name = re.findall(r"\w+", place.partition("(")[0])[-1]
    for folder in SOURCES:
        for path in sorted((tree / folder).rglob("*")):
            if path.suffix in (".c", ".cpp", ".cu", ".cuh", ".h") and name in path.read_text(errors="replace"):
                yield str(path.relative_to(tree))


def print_report(name: str, findings: list[Finding]) -> None:
    for finding in findings:
        print(f"{finding.kind:9}  {finding.insertion}: {finding.insertion.file}: {finding.message}")
    n = Counter(finding.kind for finding in findings)
    counts = f"{n['holds']} hold, {n['moved']} moved, {n['ambiguous']} ambiguous, {n['lost']} lost"
    print(f"{name}: {len(findings)} insertions: {counts}", flush=True)


# -- the trial


def run(command: Sequence[str | Path], **environment: str) -> None:
    """Runs a command; ends the trial if it fails."""
    line = [str(part) for part in command]
    print("+", " ".join(line), flush=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # cmake and ninja
    if subprocess.run(line, env={**os.environ, "PATH": path, **environment}, check=False).returncode != 0:
        sys.exit(f"try_llama: {line[0]} failed")


def build(source: Path, release: Release, out: Path) -> Path:
    """Builds the fork from a source; returns a folder with our package, that build of it, and the source's bindings."""
    version_file, package = out / "version.json", out / "package"
    llama_source.write_release(release, version_file)
    settings = [f"-DXQUANT_VERSION_FILE={version_file}", f"-DPython3_EXECUTABLE={sys.executable}"]
    run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", out / "build", *settings], XQUANT_LLAMA_CPP_SOURCE=str(source))
    run(["cmake", "--build", out / "build", "--target", "fork"])
    shutil.rmtree(package, ignore_errors=True)
    run(["cmake", "--install", out / "build", "--prefix", package, "--component", "xquant"])
    others = shutil.ignore_patterns("lib", "__pycache__")
    for ours in ("xquant_gguf", "xquant_gguf_hook"):
        shutil.copytree(ROOT / ours, package / ours, ignore=others, dirs_exist_ok=True)
    if bindings_version(source):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        run([*pip, package, source], CMAKE_ARGS="-DLLAMA_BUILD=OFF")
    return package


def test(package: Path) -> None:
    """Runs the oracle tests with a built package."""
    os.chdir(package)  # `python -m` looks here first
    path = {"PYTHONPATH": str(package)}
    modules = "import xquant_gguf, llama_cpp; print(xquant_gguf.__file__, llama_cpp.__file__, llama_cpp.__version__)"
    run([sys.executable, "-c", modules], **path)
    tests = sorted((ROOT / "tests").rglob("test_oracle.py"))
    run([sys.executable, "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT, *tests], **path)


def bindings_version(source: Path) -> str:
    """Version of the llama-cpp-python in an sdist or folder; empty for a bare llama.cpp."""
    text = ""
    if source.is_file():
        with tarfile.open(source) as tar:
            for member in tar:
                if member.name.count("/") == 2 and member.name.endswith("/llama_cpp/__init__.py"):
                    file = tar.extractfile(member)
                    text = file.read().decode() if file else ""
                    break
    elif (source / "llama_cpp" / "__init__.py").exists():
        text = (source / "llama_cpp" / "__init__.py").read_text()
    found = re.search(r'__version__ = "(.+)"', text)
    return found.group(1) if found else ""


def number_of_types(tree: Path) -> int:
    """How many ggml types a llama.cpp has: the number that ours takes."""
    scanned = scan_file(tree / "ggml" / "include" / "ggml.h")
    found = re.search(r"\bGGML_TYPE_COUNT\s*=\s*(\d+)", scanned.code) if scanned else None
    if not found:
        sys.exit(f"try_llama: {tree}/ggml/include/ggml.h gives GGML_TYPE_COUNT no number")
    return int(found.group(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("version", nargs="?", help="of llama-cpp-python, fetched with pip")
    which.add_argument("--source", type=Path, help="a local sdist or folder of llama-cpp-python or llama.cpp")
    parser.add_argument("--report", action="store_true", help="build and test nothing")
    arguments = parser.parse_args()
    pinned = llama_source.read_release()
    try:
        if arguments.source:
            source: Path = arguments.source.expanduser().resolve()
            version = bindings_version(source) if source.exists() else ""
        else:
            version = arguments.version
            source = llama_source.fetch(Release(version, "", 0))
        name = f"llama-cpp-python {version}" if version else f"{source}, with the bindings of {pinned.version}"
        print(f"{name}: SHA-256 {downloads.sha256(source)}" if source.is_file() else name, flush=True)
        out = ROOT / "build" / f"llama-{version or source.name}"
        original = out / "original"
        shutil.rmtree(original, ignore_errors=True)
        original.mkdir(parents=True)
        llama_source.unpack(source, original)
        number = number_of_types(original)
        findings = report(original, insert.insertions(number))
    except (llama_source.Unusable, insert.Refused) as error:
        sys.exit(f"try_llama: {error}")
    print_report(name, findings)
    if arguments.report:
        return
    if any(finding.kind != "holds" for finding in findings):
        sys.exit("try_llama: not built: change native/llama/insertions.py and fixes.py so that all hold")
    sha256 = downloads.sha256(source) if source.is_file() else ""
    test(build(source, Release(version or pinned.version, sha256, number), out))


if __name__ == "__main__":
    main()
