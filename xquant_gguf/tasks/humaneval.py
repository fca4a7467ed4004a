"""HumanEval (Chen et al. 2021, arXiv 2107.03374): functions that a model writes from their descriptions, run on tests.

Descriptions alone are short: no page of theirs would be sealed.  So a model reads a module of several functions whose
bodies are missing, between functions of our own, and is asked for each of the missing ones behind it: descriptions are
read from codes.  Scores are for comparing caches, not with published ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xquant_gguf.llama import Llama
from xquant_gguf.tasks.model import ReadOnce, chat_prompt, common, greedy, sealed_tokens, text_of
from xquant_gguf.tasks.sandbox import ends_well
from xquant_gguf.tasks.task import Item, Task, json_lines, read_data

AROUND = Path(__file__).parent.parent / "data" / "around.py.txt"
"""Functions of our own; a line of nothing but ... stands where the missing ones go."""
GROUP = 5
"""Problems of a module."""
MODULE = "Here is a Python module. Some of its functions have no body yet.\n\n```python\n{}\n```\n\n"
QUESTION = "Write the function `{}` of this module, complete with its body. Answer with its code alone."
FIELDS = ("task_id", "prompt", "entry_point", "test")


@dataclass(frozen=True)
class Problem:
    """A function's head and description, its name, its tests, and the problems of its module, itself among them."""

    prompt: str
    name: str
    test: str
    module: tuple[str, ...]


def read_problems(path: Path, text: str) -> dict[str, Problem]:
    """Problems of the benchmark's JSON lines by task_id; ValueError names the line and field that are wrong."""
    found: dict[str, dict[str, Any]] = {}
    for number, fields in json_lines(path, text):
        for field in FIELDS:
            value = fields.get(field)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{path}, line {number}: {field} is {value!r}, must be a text that is not empty")
        if not fields["entry_point"].isidentifier():
            raise ValueError(f"{path}, line {number}: entry_point is {fields['entry_point']!r}, must be a Python name")
        if fields["task_id"] in found:
            raise ValueError(f"{path}, line {number}: task_id is {fields['task_id']!r}, as in a line before")
        found[fields["task_id"]] = fields
    rows = list(found.values())
    modules = [tuple(row["prompt"] for row in rows[i - i % GROUP :][:GROUP]) for i in range(len(rows))]
    return {
        row["task_id"]: Problem(row["prompt"], row["entry_point"], row["test"], module)
        for row, module in zip(rows, modules, strict=True)
    }


def code_of(answer: str) -> str:
    """The first block of code in an answer; all of it if it has none."""
    block = re.search(r"```[^\n]*\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    return block.group(1) if block else answer


class HumanEval(Task):
    """The problems of a file; --limit: the first of them; --max-tokens: those of a function.

    run_code: that the user knows what it does: it runs code which a model wrote (xquant_gguf.tasks.sandbox).
    """

    name, metrics = "humaneval", ("passed",)

    def __init__(
        self, data: str, limit: int | None = None, max_tokens: int = 384, run_code: bool | None = None
    ) -> None:
        if not run_code:
            raise ValueError("--task humaneval runs code that a model wrote: say so with --run-code")
        text, self.settings = read_data(data)
        self._before, self._behind = AROUND.read_text(encoding="utf-8").strip().split("\n...\n")
        self.settings.update(max_tokens=max_tokens, around=AROUND.read_text(encoding="utf-8"))
        self._max_tokens = max_tokens
        self._module = ReadOnce()
        self.items = [Item(name, problem) for name, problem in read_problems(Path(data), text).items()][:limit]

    def prompt(self, llm: Llama, problem: Problem) -> tuple[list[int], list[int]]:
        """Tokens of the module and of the question behind it."""
        stubs = (f"{stub.rstrip()}\n    ..." for stub in problem.module)
        module = MODULE.format("\n\n\n".join([self._before.rstrip(), *stubs, self._behind.strip()]))
        shared = chat_prompt(llm, module)
        tokens = chat_prompt(llm, module, QUESTION.format(problem.name))
        n = common(shared, tokens)
        return tokens[:n], tokens[n:]

    def needed(self, llm: Llama, item: Item) -> int:
        """Tokens of its prompt and of an answer."""
        return sum(map(len, self.prompt(llm, item.content))) + self._max_tokens

    def ask(self, llm: Llama, item: Item) -> dict[str, Any]:
        """Whether the tests pass of the function that a model writes."""
        problem: Problem = item.content
        module, question = self.prompt(llm, problem)
        n = len(module) + len(question)
        self._module.read(llm, module)
        sealed = sealed_tokens(llm)
        answer = text_of(llm, greedy(llm, question, len(module), self._max_tokens))
        # the head stays in front of it for what it imports and defines; its own function is defined anew
        program = f"{problem.prompt}\n    pass\n\n{code_of(answer)}\n\n{problem.test}\n\ncheck({problem.name})\n"
        passed = float(ends_well(program))
        return {"passed": passed, "answer": answer, "tokens": n, "tokens_in_codes": sealed}
