"""What a task is: items, how a model is asked one, and what its answer is worth."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xquant_gguf.llama import Llama


@dataclass(frozen=True)
class Item:
    """One question: its name among the others, and what the task makes of it."""

    name: str
    content: Any


class Task(ABC):
    """A benchmark.

    metrics: names of the scores, the main one first.  settings: all that its answers depend on.  least_ctx: tokens of
    context without which it cannot be asked.  beside_f16: whether F16 is always asked, and asked first, so that other
    caches follow what it answered.
    """

    name: str
    metrics: tuple[str, ...]
    items: list[Item]
    settings: dict[str, Any]
    least_ctx = 0
    beside_f16 = False

    @abstractmethod
    def ask(self, llm: Llama, item: Item) -> dict[str, Any]:
        """The metrics, "answer", "tokens" of the prompt, and "tokens_in_codes" that an XQuant cache then held.

        Depends on the model and the item alone, not on what was asked before.
        """

    def needed(self, llm: Llama, item: Item) -> int:
        """Tokens of context that an item needs, if that may be more than least_ctx; known before any item is asked."""
        return 0

    def follow(self, llm: Llama, item: Item, answer: Any) -> dict[str, float]:
        """Further metrics of a task with beside_f16: of a cache that reads F16's answer to this item."""
        return {}

    def compare(self, answer: Any, reference: Any) -> dict[str, float]:
        """How near an answer is to the F16 cache's."""
        return {"same_as_f16": float(answer == reference)}

    def details(self, answers: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
        """What a task tells beside the means; answers: those to all items, by KV type."""
        return {}

    def rows(self, details: Mapping[str, Any]) -> list[list[str]]:
        """What is printed of the details: a table with its head, or nothing."""
        return []


def read_data(path: str) -> tuple[str, dict[str, Any]]:
    """A data file's text, of a name that ends with .gz unpacked, and the settings that tell it from another file."""
    raw = Path(path).read_bytes()
    settings = {"data": Path(path).name, "data_sha256": hashlib.sha256(raw).hexdigest()}
    try:
        if path.endswith(".gz"):
            raw = gzip.decompress(raw)
        return raw.decode("utf-8-sig"), settings
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8 text ({error})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: must be compressed by gzip, as its name says ({error})") from error


def json_lines(path: str | Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a text that has one a line, and the lines' numbers; ValueError names a line that is not JSON.

    What is no object has no fields, as far as a caller sees.
    """
    lines = text.removesuffix("\n").split("\n")  # splitlines would also split where JSON allows it: U+2028, U+0085
    for number, line in enumerate(lines if text else [], 1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: is not JSON ({error})") from error
        yield number, entry if isinstance(entry, dict) else {}
