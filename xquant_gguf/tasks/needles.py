"""Recall: many numbers with names in filler text, each asked for by its name.

The text is made as that of pass keys is.  It is read once; the cache is put back for each question.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from xquant_gguf.llama import Llama
from xquant_gguf.plan import PAGE
from xquant_gguf.tasks.model import ReadOnce, chat_prompt, common, greedy, sealed_tokens, text_of
from xquant_gguf.tasks.passkey import MAX_TOKENS, found_by_depth, found_rows, sentence
from xquant_gguf.tasks.task import Item, Task

NAMES = (
    "amber", "azure", "beige", "black", "blue", "bronze", "brown", "copper", "coral", "crimson", "gold", "green",
    "grey", "indigo", "ivory", "lilac", "maroon", "olive", "orange", "pink", "purple", "red", "scarlet", "silver",
    "turquoise", "violet", "white", "yellow",
)  # fmt: skip
NEEDLE = "The number of the {} door is {}."
TEXT = "Numbers of doors are hidden in this text. Find them and remember them.\n\n{}\n\n"
QUESTION = "What is the number of the {} door? Say the number."
MOST_OF_QUESTION = 64
"""Tokens that are kept free for a question and the end of its message."""


class Needles(Task):
    """So many needles at even depths in a text, for each of lengths (tokens of prompt and answer) and repeats."""

    name, metrics = "needles", ("found",)

    def __init__(
        self, lengths: Sequence[int] = (4096, 8192, 16384), needles: int = 8, repeats: int = 1, seed: int = 0
    ) -> None:
        if not 1 <= needles <= len(NAMES):
            raise ValueError(f"--needles is {needles}, must be from 1 to {len(NAMES)}")
        least = 2 * PAGE + 32 * needles
        if min(lengths) < least:
            raise ValueError(f"--lengths has {min(lengths)}, must be at least {least} for {needles} needles")
        self.settings = {"seed": seed, "needles": needles}
        self.least_ctx = max(lengths)
        self._needles = needles
        self._text = ReadOnce()
        cells = [(length, i, n) for i in range(repeats) for length in lengths for n in range(needles)]
        self.items = [Item(f"{length} tokens, {i}, needle {n}", (length, i, n)) for length, i, n in cells]

    def hidden(self, length: int, repeat: int) -> tuple[list[tuple[str, str]], random.Random]:
        """Names and numbers of a text, first to last, and what its filler is drawn from."""
        rng = random.Random(f"{self.settings['seed']}, {self._needles} needles, {length}, {repeat}")
        names = rng.sample(NAMES, self._needles)
        numbers = rng.sample(range(10000, 100000), self._needles)
        return [(name, str(number)) for name, number in zip(names, numbers, strict=True)], rng

    def text(self, llm: Llama, length: int, repeat: int) -> str:
        """Needles in the middle of equal parts of filler, as much of it as fits the length."""
        hidden, rng = self.hidden(length, repeat)
        needles = [NEEDLE.format(*pair) for pair in hidden]
        room = length - MAX_TOKENS - MOST_OF_QUESTION - len(chat_prompt(llm, TEXT.format(" ".join(needles))))
        filler: list[str] = []
        while room >= 0:
            filler.append(sentence(rng))
            room -= len(llm.tokenize(f" {filler[-1]}".encode(), add_bos=False))
        del filler[-1:]
        n = len(filler)
        for i in reversed(range(len(needles))):
            filler.insert(round(self.depth(i) * n), needles[i])
        return TEXT.format(" ".join(filler))

    def depth(self, needle: int) -> float:
        """Where a needle stands, 0 first to 1 last."""
        return (needle + 0.5) / self._needles

    def prompt(self, llm: Llama, item: Item) -> tuple[list[int], list[int], str]:
        """Tokens of the text and of the question behind it, and the number."""
        length, repeat, n = item.content
        text = self.text(llm, length, repeat)
        name, number = self.hidden(length, repeat)[0][n]
        shared = chat_prompt(llm, text)
        tokens = chat_prompt(llm, text, QUESTION.format(name))
        at = common(shared, tokens)
        return tokens[:at], tokens[at:], number

    def ask(self, llm: Llama, item: Item) -> dict[str, Any]:
        """Whether a greedy answer contains the number."""
        text, question, number = self.prompt(llm, item)
        self._text.read(llm, text)
        sealed = sealed_tokens(llm)
        answer = text_of(llm, greedy(llm, question, len(text), MAX_TOKENS))
        result = {"found": float(number in answer), "answer": answer}
        return {**result, "tokens": len(text) + len(question), "tokens_in_codes": sealed}

    def details(self, answers: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
        """table: the share of needles that were found, by KV type, length and depth."""
        cells = [(length, self.depth(n)) for length, _, n in (item.content for item in self.items)]
        return {"table": found_by_depth(cells, answers)}

    def rows(self, details: Mapping[str, Any]) -> list[list[str]]:
        """That table."""
        return found_rows(details["table"])
