"""TruthfulQA (Lin et al. 2021, arXiv 2109.07958), multiple choice.

MC1: whether the best answer is likelier than every false one, by the sum of its tokens' log-probabilities.  MC2: the
true answers' share of the probability of all answers.  A question follows a fixed primer of answered questions (our
own, data/primer.txt), which is long enough that most of it is read from sealed pages; what a quantized cache loses is
lost there.  Answers are scored as the file has them.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xquant_gguf.evaluate import log_probabilities
from xquant_gguf.llama import Llama
from xquant_gguf.tasks.model import ReadOnce, common, sealed_tokens
from xquant_gguf.tasks.task import Item, Task, read_data

PRIMER = Path(__file__).parent.parent / "data" / "primer.txt"
COLUMNS = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")


@dataclass(frozen=True)
class Question:
    """A question, its true answers, the best of them first, and its false ones."""

    text: str
    true: tuple[str, ...]
    false: tuple[str, ...]


def read_questions(path: Path, text: str) -> list[Question]:
    """Questions from the benchmark's CSV; ValueError names a column that is missing or a row that lacks answers."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"{path}: there is no column {missing[0]!r}; needed are {', '.join(COLUMNS)}")
    questions = []
    for row in reader:
        best, true, false = ([a.strip() for a in (row[c] or "").split(";") if a.strip()] for c in COLUMNS[1:])
        # the best answer is one, whatever stands in it
        first = "; ".join(best)
        question = Question(row["Question"] or "", (first, *(a for a in true if a != first)), tuple(false))
        if not question.text or not first or not false:
            raise ValueError(f"{path}, line {reader.line_num}: question, best and incorrect answers must not be empty")
        questions.append(question)
    return questions


def scores(logp: np.ndarray[Any, np.dtype[np.float64]], n_true: int) -> dict[str, float]:
    """mc1 and mc2 from log-probabilities [answer]: the best answer, the other true ones, then the false ones."""
    share = np.exp(logp - logp.max())
    return {"mc1": float(logp[0] > logp[n_true:].max()), "mc2": float(share[:n_true].sum() / share.sum())}


class TruthfulQA(Task):
    """The questions of a file; --limit: the first of them."""

    name, metrics = "truthfulqa", ("mc1", "mc2")

    def __init__(self, data: str, limit: int | None = None) -> None:
        text, self.settings = read_data(data)
        self.settings["primer"] = PRIMER.read_text(encoding="utf-8").strip()
        questions = read_questions(Path(data), text)[:limit]
        self.items = [Item(str(i), question) for i, question in enumerate(questions)]
        self._primer = ReadOnce()

    def prompt(self, llm: Llama, question: Question) -> tuple[list[int], list[int], list[list[int]]]:
        """Tokens of the primer, of the question, and of the question with each answer."""
        asked = f"\n\nQ: {question.text}\nA:"
        whole = [llm.tokenize(f"{asked} {a}".encode(), add_bos=False) for a in (*question.true, *question.false)]
        return llm.tokenize(self.settings["primer"].encode()), llm.tokenize(asked.encode(), add_bos=False), whole

    def needed(self, llm: Llama, item: Item) -> int:
        """Tokens of primer, question and longest answer."""
        primer, _, whole = self.prompt(llm, item.content)
        return len(primer) + max(map(len, whole))

    def ask(self, llm: Llama, item: Item) -> dict[str, Any]:
        """Scores one question; answer: number of the likeliest choice (true ones first)."""
        question: Question = item.content
        primer, prefix, whole = self.prompt(llm, question)
        n_primer = len(primer)
        # a tokenizer may join the end of the question and the start of an answer
        n = common(prefix, *whole)
        self._primer.read(llm, primer)
        first = log_probabilities(llm, prefix[:n], n_primer)[-1:]
        sealed = sealed_tokens(llm)
        logp = []
        for tokens in whole:
            answer = tokens[n:]
            llm.session.remove(0, n_primer + n)
            rest = log_probabilities(llm, answer[:-1], n_primer + n) if len(answer) > 1 else first[:0]
            rows = np.concatenate([first, rest])
            logp.append(float(rows[np.arange(len(answer)), answer].sum(dtype=np.float64)))
        result = scores(np.array(logp), len(question.true))
        return {**result, "answer": int(np.argmax(logp)), "tokens": n_primer + n, "tokens_in_codes": sealed}
