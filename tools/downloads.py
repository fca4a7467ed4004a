"""Where downloads are kept, in the user's cache folder, and their hashes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def folder() -> Path:
    """Our folder in the user's cache, made if it is not there."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xquant-gguf"
    path.mkdir(parents=True, exist_ok=True)
    return path


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
