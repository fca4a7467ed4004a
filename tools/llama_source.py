"""The llama.cpp source that the fork is made from: a llama-cpp-python sdist, or a local copy of it.

native/llama/version.json says which release it is, its SHA-256, and the number of our ggml type in it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import downloads

VERSION_FILE = Path(__file__).resolve().parent.parent / "native" / "llama" / "version.json"
# What the fork, its front ends and tests/upstream are built from; documents, examples and pages stay behind.
FOLDERS = ("cmake", "common", "ggml", "include", "licenses", "scripts", "src", "tests", "tools", "vendor")
PARTS = ("CMakeLists.txt", "LICENSE", *FOLDERS)


class Unusable(Exception):
    """A source that the fork cannot be made from."""


@dataclass(frozen=True)
class Release:
    """A release of llama-cpp-python. A hash of "" is not checked."""

    version: str
    sha256: str
    ggml_type: int

    @property
    def sdist(self) -> str:
        return f"llama_cpp_python-{self.version}.tar.gz"


def read_release(file: Path = VERSION_FILE) -> Release:
    """The release that a version file names."""
    entries = json.loads(file.read_text())
    return Release(entries["llama_cpp_python"], entries["sha256"], entries["ggml_type"])


def write_release(release: Release, file: Path) -> None:
    entries = {"llama_cpp_python": release.version, "sha256": release.sha256, "ggml_type": release.ggml_type}
    file.write_text(json.dumps(entries, indent=4) + "\n")


def fetched(release: Release) -> Path | None:
    """Path of a release's sdist in the user's cache folder, its hash checked; None if it is not there."""
    path = downloads.folder() / release.sdist
    return path if path.exists() and release.sha256 in ("", downloads.sha256(path)) else None


def fetch(release: Release) -> Path:
    """Path of a release's sdist in the user's cache folder, fetched with pip if it is not there."""
    if ready := fetched(release):
        return ready
    target = downloads.folder() / release.sdist
    print(f"fetching {release.sdist} (73 MiB)", flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "-d", work]
        if release.sha256:
            requirements = Path(work) / "requirements.txt"
            requirements.write_text(f"llama-cpp-python=={release.version} --hash=sha256:{release.sha256}\n")
            # --no-build-isolation: pip only reads the metadata, with the scikit-build-core that builds us anyway.
            command += ["--no-build-isolation", "--require-hashes", "-r", str(requirements)]
        else:
            command.append(f"llama-cpp-python=={release.version}")
        if subprocess.run(command, check=False).returncode != 0:
            raise Unusable(f"pip could not fetch {release.sdist}; XQUANT_LLAMA_CPP_SOURCE may name a local copy")
        os.replace(Path(work) / release.sdist, target)
    return target


def local_copy(release: Release) -> Path | None:
    """The sdist or folder that XQUANT_LLAMA_CPP_SOURCE names, its hash checked if it is an sdist; None without it."""
    local = os.environ.get("XQUANT_LLAMA_CPP_SOURCE")
    if not local:
        return None
    path = Path(local).expanduser().resolve()
    if path.is_file() and release.sha256 not in ("", downloads.sha256(path)):
        raise Unusable(
            f"XQUANT_LLAMA_CPP_SOURCE={path}: SHA-256 is {downloads.sha256(path)}, must be {release.sha256} "
            f"({release.sdist})"
        )
    if not path.exists():
        raise Unusable(f"XQUANT_LLAMA_CPP_SOURCE={path} does not exist")
    return path


def find(release: Release) -> Path:
    """The sdist or folder to build from."""
    return local_copy(release) or fetch(release)


def unpack(source: Path, out: Path) -> None:
    """Copies the parts of llama.cpp that are built from an sdist, an unpacked one or a llama.cpp folder into out."""
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        top = source
        if source.is_file():
            with tarfile.open(source) as tar:
                if hasattr(tarfile, "data_filter"):
                    tar.extractall(work, filter="data")
                else:  # the archive's hash was checked, so that its member names are known to be harmless
                    tar.extractall(work)
            top = next(Path(work).iterdir())
        llama = top / "vendor" / "llama.cpp" if (top / "vendor" / "llama.cpp").exists() else top
        if not (llama / "src" / "llama-kv-cache.cpp").exists():
            raise Unusable(f"{source} holds no llama.cpp source (src/llama-kv-cache.cpp)")
        for part in PARTS:
            if (llama / part).is_dir():
                shutil.copytree(llama / part, out / part, symlinks=True)
            elif (llama / part).exists():
                shutil.copy2(llama / part, out / part)
