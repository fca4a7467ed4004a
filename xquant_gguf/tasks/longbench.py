"""LongBench's multi_news (Bai et al. 2023, arXiv 2308.14508): a summary of several news articles, by ROUGE-L.

Articles that do not fit the context lose their middle, as there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xquant_gguf.llama import Llama
from xquant_gguf.plan import PAGE
from xquant_gguf.tasks.model import chat_prompt, greedy_answer, sealed_tokens
from xquant_gguf.tasks.task import Item, Task, json_lines, read_data

QUESTION = "Here are several news articles on one event.\n\n{}\n\nSummarize all of the news above on one page."


def rouge_l(text: str, references: list[str]) -> float:
    """The best F-measure of ROUGE-L against any reference; ImportError names the extra if rouge-score is missing."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("longbench needs the package rouge-score: pip install 'xquant-gguf[tasks]'") from error
    scorer = RougeScorer(["rougeL"])
    return max(float(scorer.score(reference, text)["rougeL"].fmeasure) for reference in references)


def read_documents(path: Path, text: str) -> list[dict[str, Any]]:
    """Objects with "context" and "answers", one a line; ValueError names the line and field that are wrong."""
    documents = []
    for number, fields in json_lines(path, text):
        context, answers = fields.get("context"), fields.get("answers")
        if not isinstance(context, str) or not context:
            raise ValueError(f"{path}, line {number}: context must be a text that is not empty")
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
            raise ValueError(f"{path}, line {number}: answers must be a list of at least one text")
        documents.append(fields)
    return documents


class LongBench(Task):
    """The articles of a file; --limit: the first of them; --max-tokens: those of a summary."""

    name, metrics = "longbench", ("rouge_l",)

    def __init__(self, data: str, limit: int | None = None, max_tokens: int = 512) -> None:
        rouge_l("", [""])  # a missing package is told before hours of work
        text, self.settings = read_data(data)
        self.settings["max_tokens"] = max_tokens
        self._max_tokens = max_tokens
        self.least_ctx = max_tokens + 2 * PAGE
        self.items = [Item(str(i), document) for i, document in enumerate(read_documents(Path(data), text)[:limit])]

    def prompt(self, llm: Llama, context: str) -> list[int]:
        """The question's tokens; what is too long for the context is cut out of the middle of the articles."""
        room = llm.n_ctx() - self._max_tokens
        tokens = chat_prompt(llm, QUESTION.format(context))
        articles = llm.tokenize(context.encode(), add_bos=False)
        keep = len(articles)
        while len(tokens) > room:  # pieces that were cut apart may need a token or two more
            keep -= len(tokens) - room
            head, tail = articles[: keep - keep // 2], articles[len(articles) - keep // 2 :]
            cut = llm.detokenize(head).decode(errors="ignore") + llm.detokenize(tail).decode(errors="ignore")
            tokens = chat_prompt(llm, QUESTION.format(cut))
        return tokens

    def ask(self, llm: Llama, item: Item) -> dict[str, Any]:
        """A greedy summary and its ROUGE-L."""
        prompt = self.prompt(llm, item.content["context"])
        answer = greedy_answer(llm, prompt, self._max_tokens)
        result = {"rouge_l": rouge_l(answer, item.content["answers"]), "answer": answer}
        return {**result, "tokens": len(prompt), "tokens_in_codes": sealed_tokens(llm)}

    def compare(self, answer: Any, reference: Any) -> dict[str, float]:
        """Two summaries are seldom the same to the letter: their ROUGE-L beside it."""
        return {**super().compare(answer, reference), "rouge_l_to_f16": rouge_l(answer, [reference])}
