"""llama.cpp's own programs of the fork, which lie beside its libraries where the package was built with them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from xquant_gguf import native
from xquant_gguf.kv_types import LLAMA_TYPES
from xquant_gguf.plan import preset_names

PROGRAMS = {
    "llama-server": "llama-server",
    "llama-cli": "llama-cli",
    "llama-bench": "llama-bench",
    "llama-perplexity": "llama-perplexity",
    "rpc-server": "ggml-rpc-server",
}
"""Names of the programs, and of their files."""
ON_WINDOWS = os.name == "nt"


def path(name: str) -> Path:
    """Where a program of PROGRAMS lies; OSError if the package was built without programs."""
    file = native.LIBRARY_DIR / (PROGRAMS[name] + ".exe" * ON_WINDOWS)
    if not file.exists():
        raise OSError(
            f"{name} is not in {native.LIBRARY_DIR}: this package was built without programs; wheels have them, and "
            "so has a build with -DXQUANT_PROGRAMS=ON in CMAKE_ARGS"
        )
    return file


def cache_arguments(kv_type: str | None) -> list[str]:
    """Options of llama.cpp's programs that choose a cache: an XQuant preset's, one's of llama.cpp's own types.

    None: XQuant, as the model's file says, or else with the default preset.
    """
    if kv_type is None:
        return ["-ctk", "xquant", "-ctv", "xquant"]
    if kv_type in LLAMA_TYPES:
        return ["-ctk", kv_type, "-ctv", kv_type]
    if kv_type not in preset_names():
        raise ValueError(f"--kv-type is {kv_type!r}, must be one of {', '.join((*preset_names(), *LLAMA_TYPES))}")
    return ["-ctk", "xquant", "-ctv", "xquant", "--override-kv", f"xquant.preset=str:{kv_type}"]


def execute(name: str, arguments: Sequence[str]) -> NoReturn:
    """Replaces this process by a program; on Windows, where that cannot be, runs it and ends as it does."""
    file = path(name)
    if ON_WINDOWS:
        sys.exit(subprocess.run([file, *arguments], check=False).returncode)
    os.execv(file, [name, *arguments])
