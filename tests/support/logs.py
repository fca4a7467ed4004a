"""What llama.cpp logs, for tests that ask why something was refused."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from support.contexts import llama_cpp


@contextmanager
def llama_log() -> Iterator[list[str]]:
    """The lines that llama.cpp logs while the block runs; afterwards llama_cpp's own callback has them again."""
    lines: list[str] = []

    def log(level: int, text: bytes, _: object) -> None:
        lines.append(text.decode(errors="replace"))

    callback = llama_cpp.llama_log_callback(log)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p())
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, ctypes.c_void_p())
