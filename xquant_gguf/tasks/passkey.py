"""Pass-key retrieval: a five-digit number within filler text, asked for at the end.

The text is made here: sentences of random words, all from one seed, so that every machine asks the same.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from xquant_gguf.llama import Llama
from xquant_gguf.plan import PAGE
from xquant_gguf.tasks.model import chat_prompt, greedy_answer, sealed_tokens
from xquant_gguf.tasks.task import Item, Task

WHO = ("baker", "captain", "doctor", "farmer", "gardener", "librarian", "miller", "painter")
DID = ("admired", "carried", "counted", "described", "found", "hid", "mended", "moved")
WHAT = ("barrels", "blankets", "bottles", "candles", "chairs", "clocks", "ladders", "lanterns")
KIND = ("broken", "clean", "cold", "dusty", "empty", "heavy", "narrow", "old")
WHERE = ("barn", "bridge", "cellar", "chapel", "forest", "harbour", "kitchen", "market")
WHEN = (
    "after the rain",
    "at noon",
    "before dawn",
    "during the fair",
    "every spring",
    "last winter",
    "on Sunday",
    "once more",
)

KEY = "The pass key is {0}. Remember it: {0} is the pass key."
QUESTION = "A pass key is hidden in this text. Find it and remember it.\n\n{}\n\nWhat is the pass key? Say the number."
MAX_TOKENS = 24
"""Tokens of an answer: a short sentence around five digits."""


def sentence(rng: random.Random) -> str:
    """A sentence without a number."""
    who, did, kind, what, where, when = (rng.choice(words) for words in (WHO, DID, KIND, WHAT, WHERE, WHEN))
    return f"The {who} {did} the {kind} {what} near the {where} {when}."


class PassKey(Task):
    """One key for each of lengths (tokens of prompt and answer), depths (0: first, 1: last sentence) and repeats."""

    name, metrics = "passkey", ("found",)

    def __init__(
        self,
        lengths: Sequence[int] = (1024, 2048, 4096),
        depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
        repeats: int = 1,
        seed: int = 0,
    ) -> None:
        for depth in depths:
            if not 0 <= depth <= 1:
                raise ValueError(f"--depths has {depth}, must be from 0 to 1")
        if min(lengths) < 2 * PAGE:
            raise ValueError(f"--lengths has {min(lengths)}, must be at least {2 * PAGE}")
        self.settings = {"seed": seed}
        self.least_ctx = max(lengths)
        cells = [(length, float(depth), i) for i in range(repeats) for length in lengths for depth in depths]
        self.items = [Item(f"{length} tokens, depth {depth}, {i}", (length, depth, i)) for length, depth, i in cells]

    def prompt(self, llm: Llama, item: Item) -> tuple[list[int], str]:
        """The question's tokens, as many as fit its length, and the key."""
        length, depth, _ = item.content
        rng = random.Random(f"{self.settings['seed']}, {item.name}")
        key = str(rng.randrange(10000, 100000))

        def tokens(sentences: Sequence[str]) -> list[int]:
            at = round(depth * len(sentences))
            text = " ".join([*sentences[:at], KEY.format(key), *sentences[at:]])
            return chat_prompt(llm, QUESTION.format(text))

        sentences: list[str] = []
        size = len(tokens([])) + MAX_TOKENS
        while size < length:
            sentences.append(sentence(rng))
            size += len(llm.tokenize(f" {sentences[-1]}".encode(), add_bos=False))
        while len(prompt := tokens(sentences)) + MAX_TOKENS > length and sentences:
            sentences.pop()
        return prompt, key

    def ask(self, llm: Llama, item: Item) -> dict[str, Any]:
        """Whether a greedy answer contains the key."""
        prompt, key = self.prompt(llm, item)
        answer = greedy_answer(llm, prompt, MAX_TOKENS)
        result = {"found": float(key in answer), "answer": answer}
        return {**result, "tokens": len(prompt), "tokens_in_codes": sealed_tokens(llm)}

    def details(self, answers: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
        """table: the share of keys that were found, by KV type, length and depth."""
        return {"table": found_by_depth([item.content[:2] for item in self.items], answers)}

    def rows(self, details: Mapping[str, Any]) -> list[list[str]]:
        """That table."""
        return found_rows(details["table"])


def found_by_depth(
    items: Sequence[tuple[int, float]], answers: Mapping[str, Sequence[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The share of items that were found, by KV type, length and depth; items: the length and depth of each."""
    table = []
    for kv, given in answers.items():
        cells: dict[tuple[int, float], list[float]] = {}
        for item, answer in zip(items, given, strict=True):
            cells.setdefault(item, []).append(answer["found"])
        table += [
            {"kv_type": kv, "length": length, "depth": depth, "found": sum(found) / len(found), "n": len(found)}
            for (length, depth), found in cells.items()
        ]
    return table


def found_rows(table: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What is printed of found_by_depth: a row for each KV type and length, a column for each depth."""
    depths = sorted({r["depth"] for r in table})
    cells = {(r["kv_type"], r["length"], r["depth"]): r for r in table}
    rows = [["found, by depth", "tokens", *(f"{d:.3g}" for d in depths)]]
    for kv, length in dict.fromkeys((r["kv_type"], r["length"]) for r in table):
        found = [cells[kv, length, d] for d in depths]
        rows.append([kv, str(length), *(f"{r['found'] * r['n']:.0f}/{r['n']}" for r in found)])
    return rows
