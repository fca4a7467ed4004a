"""Make the llama.cpp source tree of the fork: the pinned llama-cpp-python sdist plus the insertions of native/llama.

usage: prepare_llama.py OUT [VERSION_FILE]   (OUT/llama.cpp is the patched tree, OUT/stamp says from what it was made)

The sdist is fetched with pip, which checks its SHA-256, and kept in the user's cache folder.  XQUANT_LLAMA_CPP_SOURCE
may name a local copy instead: the .tar.gz, or an unpacked folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

import insert
import llama_source

TOOLS = [Path(__file__).with_name(f"{name}.py") for name in ("prepare_llama", "insert", "cpp_places", "llama_source")]


def prepare(out: Path, version_file: Path) -> None:
    """Makes out/llama.cpp, if it is not there or not of this release, these tables and these tools."""
    release = llama_source.read_release(version_file)
    source = llama_source.find(release)
    # A local folder is taken as it is each time; the pinned sdist and our tables say whether the tree is up to date.
    files = [*sorted(insert.TABLES.glob("*.py")), version_file, *TOOLS]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in files) + str(source).encode()).hexdigest()
    stamp, tree = out / "stamp", out / "llama.cpp"
    if source.is_file() and stamp.exists() and stamp.read_text() == key:
        return
    out.mkdir(parents=True, exist_ok=True)
    fresh = out / "llama.cpp.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    llama_source.unpack(source, fresh)
    insert.apply(fresh, insert.insertions(release.ggml_type))
    keep_times(tree, fresh)
    shutil.rmtree(tree, ignore_errors=True)
    fresh.rename(tree)
    stamp.write_text(key)
    print(f"llama.cpp of llama-cpp-python {release.version} with our insertions in {tree}", flush=True)


def keep_times(old: Path, new: Path) -> None:
    """Gives files that did not change their old times, so that only what the insertions touch is compiled again."""
    for path in new.rglob("*"):
        twin = old / path.relative_to(new)
        if path.is_file() and twin.is_file() and twin.read_bytes() == path.read_bytes():
            times = twin.stat()
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        elif path.is_file():
            os.utime(path)


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: prepare_llama.py OUT [VERSION_FILE]")
    version_file = Path(sys.argv[2]) if len(sys.argv) == 3 else llama_source.VERSION_FILE
    try:
        prepare(Path(sys.argv[1]).resolve(), version_file)
    except (llama_source.Unusable, insert.Refused) as error:
        sys.exit(f"prepare_llama: {error}")


if __name__ == "__main__":
    main()
