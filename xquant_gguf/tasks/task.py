"""What a task is: items, how a model is asked one, and what its answer is worth."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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
    context without which it cannot be asked.
    """

    name: str
    metrics: tuple[str, ...]
    items: list[Item]
    settings: dict[str, Any]
    least_ctx = 0

    @abstractmethod
    def ask(self, llm: Llama, item: Item) -> dict[str, Any]:
        """The metrics, "answer", "tokens" of the prompt, and "tokens_in_codes" that an XQuant cache then held.

        Depends on the model and the item alone, not on what was asked before.
        """

    def compare(self, answer: Any, reference: Any) -> dict[str, float]:
        """How near an answer is to the F16 cache's."""
        return {"same_as_f16": float(answer == reference)}

    def details(self, answers: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
        """What a task tells beside the means; answers: those to all items, by KV type."""
        return {}


def read_data(path: str) -> tuple[str, dict[str, Any]]:
    """A data file's text, and the settings that tell it from another file."""
    raw = Path(path).read_bytes()
    try:
        return raw.decode("utf-8-sig"), {"data": Path(path).name, "data_sha256": hashlib.sha256(raw).hexdigest()}
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8 text ({error})") from error
