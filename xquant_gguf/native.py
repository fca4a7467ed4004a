"""Binding of libxquant: the C ABI of native/include/xquant.h through cffi, read from the header itself."""

from __future__ import annotations

import ctypes
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from cffi import FFI

from xquant_gguf_hook import FILES, library_folder, library_folders

LIBRARY_DIR = library_folder() or library_folders()[0]


def declarations(header: Path) -> str:
    """The part of a C header between its `cdef: begin` and `cdef: end` marks."""
    text = header.read_text(encoding="utf-8")
    return text.split("/* cdef: begin */")[1].split("/* cdef: end */")[0].replace("XQ_API ", "")


def library_path(name: str) -> Path:
    """Path of one of our shared libraries (without lib and suffix); OSError names it when it is missing."""
    for file in FILES:
        path = LIBRARY_DIR / file.format(name)
        if path.exists():
            return path
    searched = " or ".join(map(str, library_folders()))
    raise OSError(f"lib{name} is not in {searched}: build the package (`make`, or `pip install .`)")


def open_library(ffi: FFI, name: str) -> Any:
    """One of our shared libraries, as cffi gives it."""
    path = str(library_path(name))
    ctypes.CDLL(path)  # on Windows Python looks beside it for what it is linked to
    return ffi.dlopen(path)


def built_from() -> dict[str, Any]:
    """What native/llama/version.json said when the libraries were built."""
    path = LIBRARY_DIR / "version.json"
    if not path.exists():
        raise OSError(f"{path} is missing: build the package (`make`, or `pip install .`)")
    pins: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return pins


@lru_cache(maxsize=1)
def load() -> tuple[FFI, Any]:
    """The cffi instance and libxquant. XQUANT_LIBRARY may name another build of the library (sanitizers)."""
    ffi = FFI()
    ffi.cdef(declarations(LIBRARY_DIR / "xquant.h"))
    return ffi, ffi.dlopen(os.environ.get("XQUANT_LIBRARY") or str(library_path("xquant")))


def error() -> str:
    """The message of the last failed call on this thread."""
    ffi, lib = load()
    return str(ffi.string(lib.xq_error()).decode())
