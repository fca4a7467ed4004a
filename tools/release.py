"""Make a release of the commit that is checked out: source archive, wheels, their tests, hashes, and the tag.

usage: release.py   (by `make release`; PYTEST names a pytest with the package's test requirements)

Builds from a clean copy of the commit, so that nothing else of this folder gets in.  Uploads nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import downloads

ROOT = Path(__file__).resolve().parent.parent


class Refused(Exception):
    """What stands against a release."""


def git(*arguments: str, root: Path = ROOT) -> str:
    """What git prints."""
    return subprocess.run(["git", *arguments], cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def version_of(root: Path) -> str:
    """The version in pyproject.toml."""
    found = re.search(r'^version = "([^"]+)"$', (root / "pyproject.toml").read_text(), re.MULTILINE)
    if found is None:
        raise Refused("pyproject.toml has no line: version = ...")
    return found[1]


def check(root: Path) -> str:
    """The version to be released; Refused says what is wrong."""
    version = version_of(root)
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        raise Refused(f"pyproject.toml: version is {version!r}, must be like 1.2.3 or 1.2.3rc1")
    if changes := git("status", "--porcelain", root=root):
        raise Refused(f"there are changes that no commit has: {changes.splitlines()[0]}")
    heading = next((line for line in (root / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")), "")
    if not re.fullmatch(rf"## {re.escape(version)}, \d{{4}}-\d\d-\d\d", heading):
        raise Refused(f"CHANGELOG.md: the first heading is {heading!r}, must be '## {version}, YYYY-MM-DD'")
    if git("tag", "--list", f"v{version}", root=root):
        raise Refused(f"there is a tag v{version} already: a version is released once")
    return version


def run(*command: str | Path, folder: Path, **environment: str) -> None:
    """Runs a command; ends everything if it fails."""
    print("+", *command, flush=True)
    if subprocess.run(command, cwd=folder, env={**os.environ, **environment}, check=False).returncode != 0:
        raise Refused(f"{command[0]} failed")


def release(root: Path) -> None:
    version = check(root)
    dist = root / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    with tempfile.TemporaryDirectory() as work:
        copy = Path(work) / "source"
        run("git", "clone", "-q", "--no-local", root, copy, folder=root)
        git("checkout", "-q", git("rev-parse", "HEAD", root=root), root=copy)
        date = git("log", "-1", "--format=%ct", root=copy)  # the same commit gives the same archives
        run(sys.executable, "-m", "build", "--sdist", "-n", "-o", dist, folder=copy, SOURCE_DATE_EPOCH=date)
        run(sys.executable, "tools/wheels.py", "--out", dist, folder=copy, SOURCE_DATE_EPOCH=date)
    run(os.environ.get("PYTEST", "pytest"), "tests/wheels", folder=root, XQUANT_WHEELS=str(dist))
    files = sorted(path for path in dist.iterdir() if path.suffix in (".whl", ".gz"))
    (dist / "SHA256SUMS").write_text("".join(f"{downloads.sha256(path)}  {path.name}\n" for path in files))
    git("tag", "-a", f"v{version}", "-m", f"Version {version}", root=root)
    print(f"v{version}: {len(files)} files and SHA256SUMS in {dist}")
    print(f"publish: git push origin v{version}; twine upload {dist}/xquant_gguf-*")


if __name__ == "__main__":
    try:
        release(ROOT)
    except Refused as error:
        sys.exit(f"release: {error}")
