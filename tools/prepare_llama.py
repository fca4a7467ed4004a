"""Make the llama.cpp source tree of the fork: the pinned llama-cpp-python sdist plus the insertions of native/llama.

usage: prepare_llama.py OUT   (OUT/llama.cpp is the patched tree, OUT/stamp says from what it was made)

The sdist is fetched with pip, which checks its SHA-256, and kept in the user's cache folder.  XQUANT_LLAMA_CPP_SOURCE
may name a local copy instead: the .tar.gz, or an unpacked folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import cache

VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
SDIST = f"llama_cpp_python-{VERSION}.tar.gz"
ROOT = Path(__file__).resolve().parent.parent
TABLES = sorted((ROOT / "native" / "llama").glob("insertions*.py"))
# What the fork and tests/upstream are built from; documents, examples and the web interface stay behind.
FOLDERS = ("cmake", "common", "ggml", "include", "licenses", "src", "tests", "tools", "vendor")
PARTS = ("CMakeLists.txt", "LICENSE", *FOLDERS)


def fail(message: str) -> None:
    sys.exit(f"prepare_llama: {message}")


def fetch() -> Path:
    """Path of the sdist in the user's cache folder, fetched with pip if it is not there."""
    target = cache.folder() / SDIST
    if target.exists() and cache.sha256(target) == SHA256:
        return target
    print(f"fetching {SDIST} (73 MiB)", flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        requirements = Path(work) / "requirements.txt"
        requirements.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SHA256}\n")
        # --no-build-isolation: pip only reads the metadata, with the scikit-build-core that builds us anyway.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        command += ["--no-build-isolation", "--require-hashes", "-r", str(requirements), "-d", work]
        if subprocess.run(command, check=False).returncode != 0:
            fail(f"pip could not fetch {SDIST}; XQUANT_LLAMA_CPP_SOURCE may name a local copy")
        os.replace(Path(work) / SDIST, target)
    return target


def source() -> Path:
    """The sdist or folder to build from, its hash checked if it is the sdist."""
    local = os.environ.get("XQUANT_LLAMA_CPP_SOURCE")
    if not local:
        return fetch()
    path = Path(local).expanduser().resolve()
    if path.is_file() and cache.sha256(path) != SHA256:
        fail(f"XQUANT_LLAMA_CPP_SOURCE={path}: SHA-256 is {cache.sha256(path)}, must be {SHA256} ({SDIST})")
    if not path.exists():
        fail(f"XQUANT_LLAMA_CPP_SOURCE={path} does not exist")
    return path


def unpack(archive: Path, out: Path) -> None:
    """Copies the parts of llama.cpp that are built into out."""
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        top = archive
        if archive.is_file():
            with tarfile.open(archive) as tar:
                if hasattr(tarfile, "data_filter"):
                    tar.extractall(work, filter="data")
                else:  # the archive's hash was checked, so that its member names are known to be harmless
                    tar.extractall(work)
            top = Path(work) / f"llama_cpp_python-{VERSION}"
        llama = top / "vendor" / "llama.cpp" if (top / "vendor" / "llama.cpp").exists() else top
        if not (llama / "src" / "llama-kv-cache.cpp").exists():
            fail(f"{archive} holds no llama.cpp source (src/llama-kv-cache.cpp)")
        for part in PARTS:
            if (llama / part).is_dir():
                shutil.copytree(llama / part, out / part)
            elif (llama / part).exists():
                shutil.copy2(llama / part, out / part)


def load(table: Path) -> list[tuple[str, str, str, str]]:
    """A table of insertions."""
    spec = importlib.util.spec_from_file_location(table.stem, table)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    insertions: list[tuple[str, str, str, str]] = module.INSERTIONS
    return insertions


def insert(tree: Path) -> None:
    """Applies the tables of insertions; stops if an anchor is missing or not unique."""
    for table in TABLES:
        for number, (file, anchor, text, where) in enumerate(load(table), 1):
            name, path = f"{table.name}, insertion {number}", tree / file
            if not path.exists():
                fail(f"{name}: {file} does not exist in llama.cpp {VERSION}")
            content = path.read_text()
            count = content.count(anchor)
            if count != 1:
                problem = "is missing from" if count == 0 else f"occurs {count} times in"
                fail(f"{name}: anchor {anchor!r} {problem} {file}")
            new = {"before": text + anchor, "after": anchor + text, "instead": text}[where]
            path.write_text(content.replace(anchor, new))


def main() -> None:
    if len(sys.argv) != 2:
        fail("usage: prepare_llama.py OUT")
    out = Path(sys.argv[1]).resolve()
    archive = source()
    # A local folder is taken as it is each time; the pinned sdist and our tables say whether the tree is up to date.
    made_from = [*TABLES, Path(__file__)]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in made_from) + str(archive).encode()).hexdigest()
    stamp, tree = out / "stamp", out / "llama.cpp"
    if archive.is_file() and stamp.exists() and stamp.read_text() == key:
        return
    out.mkdir(parents=True, exist_ok=True)
    fresh = out / "llama.cpp.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    unpack(archive, fresh)
    insert(fresh)
    keep_times(tree, fresh)
    shutil.rmtree(tree, ignore_errors=True)
    fresh.rename(tree)
    stamp.write_text(key)
    print(f"llama.cpp {VERSION} with our insertions in {tree}", flush=True)


def keep_times(old: Path, new: Path) -> None:
    """Gives files that did not change their old times, so that only what the insertions touch is compiled again."""
    for path in new.rglob("*"):
        twin = old / path.relative_to(new)
        if path.is_file() and twin.is_file() and twin.read_bytes() == path.read_bytes():
            times = twin.stat()
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        elif path.is_file():
            os.utime(path)


if __name__ == "__main__":
    main()
