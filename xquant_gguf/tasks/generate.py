"""Long generations: where the likeliest tokens part from F16's, and what becomes of the text.

A text that has parted once goes its own way; so each cache also reads F16's text, and is asked at every token whether
it would have chosen the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xquant_gguf.llama import Llama
from xquant_gguf.plan import PAGE
from xquant_gguf.tasks.model import ReadOnce, common, greedy, sealed_tokens
from xquant_gguf.tasks.task import Item, Task, json_lines, read_data

TEXT = Path(__file__).parent.parent / "data" / "calibration.txt"
"""Without a file, prompts begin at so many even steps of this text."""
BUILT_IN = 8
LENGTH = 2000
"""Characters of a built-in prompt."""
STEP = 32
"""Tokens of F16's text that are read at once."""
WORDS = 4
"""Tokens of what counts as repeated."""


def read_prompts(path: str, text: str) -> list[str]:
    """Prompts from JSON lines with a "prompt"; ValueError names the line that is wrong."""
    prompts = []
    for number, fields in json_lines(path, text):
        prompt = fields.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f"{path}, line {number}: prompt is {prompt!r}, must be a text that is not empty")
        prompts.append(prompt)
    return prompts


def built_in_prompts() -> list[str]:
    """Pieces of the calibration text: prose, code, tables."""
    text = TEXT.read_text(encoding="utf-8")
    return [text[i * len(text) // BUILT_IN :][:LENGTH] for i in range(BUILT_IN)]


def distinct(tokens: Sequence[int]) -> float:
    """Share of the runs of 4 tokens that differ from each other: 1 if nothing is repeated."""
    runs = [tuple(tokens[i : i + WORDS]) for i in range(len(tokens) - WORDS + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def parted(tokens: Sequence[int], reference: Sequence[int]) -> int | None:
    """How many tokens are the same before two texts part; None if they are the same to the end."""
    return None if list(tokens) == list(reference) else common(tokens, reference)


class Generate(Task):
    """Prompts of a file, or built-in ones; --limit: the first of them; --max-tokens: those that are generated.

    Metrics: distinct; agree, the share of F16's tokens that this cache would have chosen behind those before them.
    """

    name, metrics, beside_f16 = "generate", ("distinct", "agree"), True

    def __init__(self, data: str | None = None, limit: int | None = None, max_tokens: int = 1024) -> None:
        if data is None:
            prompts, self.settings = built_in_prompts(), {}
        else:
            text, self.settings = read_data(data)
            prompts = read_prompts(data, text)
        self.settings["max_tokens"] = max_tokens
        self.least_ctx = max_tokens + PAGE
        self.items = [Item(str(i), prompt) for i, prompt in enumerate(prompts)][:limit]
        self._max_tokens = max_tokens
        self._prompt = ReadOnce()

    def prompt(self, llm: Llama, item: Item) -> list[int]:
        """Its tokens; the text is continued as it is."""
        return list(llm.tokenize(item.content.encode(), special=False))

    def needed(self, llm: Llama, item: Item) -> int:
        """Tokens of its prompt and of an answer."""
        return len(self.prompt(llm, item)) + self._max_tokens

    def ask(self, llm: Llama, item: Item) -> dict[str, Any]:
        """The likeliest tokens behind a prompt."""
        tokens = self.prompt(llm, item)
        self._prompt.read(llm, tokens[:-1])
        made = greedy(llm, tokens[-1:], len(tokens) - 1, self._max_tokens)
        sealed = sealed_tokens(llm)
        return {"distinct": distinct(made), "answer": made, "tokens": len(tokens), "tokens_in_codes": sealed}

    def follow(self, llm: Llama, item: Item, answer: Sequence[int]) -> dict[str, float]:
        """agree: how often this cache would have chosen F16's next token, reading F16's text."""
        tokens = self.prompt(llm, item)
        self._prompt.read(llm, tokens[:-1])
        text, best = [tokens[-1], *answer[:-1]], []
        for first in range(0, len(text), STEP):
            logits = llm.session.answer(text[first : first + STEP], len(tokens) - 1 + first)
            best += [int(token) for token in logits.argmax(1)]
        same = [a == b for a, b in zip(answer, best, strict=False)]
        return {"agree": float(np.mean(same)) if same else 1.0}

    def compare(self, answer: Any, reference: Any) -> dict[str, float]:
        """Whether the texts are the same to the end, and the share that is before they part."""
        at = parted(answer, reference)
        share = 1.0 if at is None else at / max(len(answer), len(reference))
        return {"same_as_f16": float(at is None), "same_part_to_f16": share}

    def details(self, answers: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
        """parted: quartiles of the tokens before the texts part from F16's; those that do not count as their length."""
        found = {}
        for kv, given in answers.items():
            at = [
                len(b["answer"]) if (n := parted(a["answer"], b["answer"])) is None else n
                for a, b in zip(given, answers["f16"], strict=True)
            ]
            found[kv] = [float(q) for q in np.quantile(at, (0.25, 0.5, 0.75))]
        return {"parted": found}

    def rows(self, details: Mapping[str, Any]) -> list[list[str]]:
        """The quartiles by KV type."""
        head = ["tokens until it parts from F16", "25 %", "median", "75 %"]
        return [head, *([kv, *(f"{q:.0f}" for q in quartiles)] for kv, quartiles in details["parted"].items())]
