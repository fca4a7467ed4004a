"""Where downloads are kept, in the user's cache folder, and their hashes."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path


def folder() -> Path:
    """Our folder in the user's cache, made if it is not there; where none can be made, one for temporary files."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for path in (Path(cache) / "xquant-gguf", Path(tempfile.gettempdir()) / f"xquant-gguf-{os.getuid()}"):
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            print(f"{path} cannot be made ({error.strerror}); set XDG_CACHE_HOME to a folder for downloads")
            continue
        if os.access(path, os.W_OK) and path.stat().st_uid == os.getuid():
            return path
        print(f"{path} cannot be written; set XDG_CACHE_HOME to a folder for downloads")
    raise SystemExit("there is no folder for downloads")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
