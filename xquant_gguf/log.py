"""What llama.cpp logs: the reasons of its refusals, and how much of it is printed."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import llama_cpp

from xquant_gguf import fork

_LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR; llama_cpp takes it for another level, and does not print it if not verbose
_heard = threading.local()


@contextmanager
def errors() -> Iterator[list[str]]:
    """Collects what llama.cpp logs as errors on this thread within the context; it is logged all the same."""
    outer, _heard.lines = getattr(_heard, "lines", None), []
    try:
        yield _heard.lines
    finally:
        _heard.lines = outer


def refusal(said: Sequence[str]) -> str:
    """Why no context could be made: what our cache says, or else the last errors of llama.cpp."""
    ours = fork.error()  # may be that of an earlier context
    if ours and (not said or any(ours in line for line in said)):
        return ours
    return "; ".join(said[-2:]) or "llama.cpp refuses such a context"


@contextmanager
def explained(what: str, ours: bool) -> Iterator[None]:
    """A ValueError within the context says what could not be made, and why, if llama.cpp or our cache has told it.

    ours: the cache is to be an XQuant one.
    """
    with errors() as said:
        try:
            yield
        except ValueError as error:
            fork.cpu_variant()  # without one, nothing can be made
            if said or (ours and fork.error()):
                raise ValueError(f"{what}: {refusal(said)}") from error
            raise


def _log_through(before: Any, data: Any) -> Any:
    """A log callback that hands on to the one before it."""

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def listen(level: int, text: bytes, _: Any) -> None:
        lines = getattr(_heard, "lines", None)
        if lines is not None and level == _LOG_ERROR:
            lines.append(text.decode(errors="replace").strip())
        before(level, text, data)

    return listen


_before, _before_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
llama_cpp.llama_log_get(ctypes.byref(_before), ctypes.byref(_before_data))
_listener = _log_through(_before, _before_data)  # lives as long as llama.cpp may call it
llama_cpp.llama_log_set(_listener, None)


@contextmanager
def quiet() -> Iterator[None]:
    """Only errors of llama.cpp are printed within the context."""
    logger = logging.getLogger("llama-cpp-python")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
