"""Answers on disk: a JSON-lines file whose first line holds the settings, one answer a line after it.

A line is written at once and whole or not at all as far as a reader sees: what follows the last newline was cut off
when the writer was killed, and is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

Answer = dict[str, Any]


class Answers:
    """Answers by KV type and item, each kept in the file as soon as it is there; a context manager.

    path: the file, which is made or continued; None: they are kept in memory alone.  settings: all that an answer
    depends on beside its KV type and item.  Raises ValueError if the file has other settings or is damaged.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self._found: dict[tuple[str, str], Answer] = {}
        self._file = None
        if path is None:
            return
        lines = _whole_lines(path)
        if lines:
            _same(_parsed(lines[0], path, 1, {"settings"})["settings"], settings, path)
        for number, line in enumerate(lines[1:], 2):
            entry = _parsed(line, path, number, {"kv", "item", "answer"})
            self._found[entry["kv"], entry["item"]] = entry["answer"]
        self._file = path.open("ab")
        self._file.truncate(sum(len(line) for line in lines))
        if not lines:
            self._write({"settings": settings})

    def get(self, kv: str, item: str) -> Answer | None:
        """The answer, or None if there is none yet."""
        return self._found.get((kv, item))

    def add(self, kv: str, item: str, answer: Answer) -> None:
        """Keeps an answer: dictionary of what JSON can hold."""
        self._found[kv, item] = answer
        self._write({"kv": kv, "item": item, "answer": answer})

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()


def _whole_lines(path: Path) -> list[bytes]:
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]


def _parsed(line: bytes, path: Path, number: int, keys: set[str]) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or set(entry) != keys:
        raise ValueError(f"{path}, line {number}: must be a JSON object with {', '.join(sorted(keys))}")
    return entry


def _same(found: Any, settings: Mapping[str, Any], path: Path) -> None:
    asked = json.loads(json.dumps(settings))
    for key in sorted({*found, *asked}) if isinstance(found, dict) else ["settings"]:
        old = found.get(key) if isinstance(found, dict) else found
        if old != asked.get(key):
            raise ValueError(
                f"{path} holds answers with {key} {old!r}, not {asked.get(key)!r}: name another --json file, or "
                "remove that one to begin anew"
            )
