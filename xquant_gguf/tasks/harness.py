"""Tasks of EleutherAI's lm-evaluation-harness, which words the questions and scores the answers.

With enough shots, answered questions in front of each, most of what a model reads is codes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xquant_gguf.evaluate import log_probabilities
from xquant_gguf.llama import Llama
from xquant_gguf.tasks.model import ReadOnce, common, greedy, sealed_tokens
from xquant_gguf.tasks.task import Item, Task

METRICS = ("acc", "acc_norm", "acc_bytes", "exact_match")
"""Metrics that are a number for each question."""
MAX_TOKENS = 256
"""Tokens of an answer in words, if the task does not say how many."""


def load(name: str) -> Any:
    """The harness's task of a name, or of a YAML file of the harness's kind; ImportError names the extra.

    ValueError if there is no such task, or if it is a group of several.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("harness needs the package lm-eval: pip install 'xquant-gguf[harness]'") from error
    if name.endswith((".yaml", ".yml")):
        found = re.search(r"^task: *([\w-]+) *$", Path(name).read_text(encoding="utf-8"), re.MULTILINE)
        if not found:
            raise ValueError(f"{name}: has no line task: NAME")
        manager, name = TaskManager(include_path=Path(name).parent, include_defaults=False), found.group(1)
    else:
        manager = TaskManager()
    if name not in manager.all_subtasks:
        raise ValueError(f"--data is {name!r}, must be a single task of lm-evaluation-harness, or its YAML file")
    return manager.load(name)["tasks"][name]


class Harness(Task):
    """A task of the harness; --limit: its first questions; --shots: answered ones in front, if not as the task says."""

    name = "harness"

    def __init__(self, data: str, limit: int | None = None, shots: int | None = None) -> None:
        self._task = load(data)
        if shots is not None:
            self._task.set_config("num_fewshot", shots)
        self._task.set_fewshot_seed(0)
        self.metrics = tuple(metric for metric in self._task.aggregation() if metric in METRICS)
        if not self.metrics or self._task.OUTPUT_TYPE == "loglikelihood_rolling":
            raise ValueError(f"--data is {data!r}, must be a task with one of the metrics {', '.join(METRICS)}")
        try:
            self._task.build_all_requests(limit=limit)
        except ValueError as error:  # the harness's own are about a sample that is too large
            raise ValueError(f"--data {data}, --shots {self._task.config.num_fewshot}: {error}") from error
        requests: dict[int, list[Any]] = {}
        for request in self._task.instances:
            requests.setdefault(request.doc_id, []).append(request)
        self.items = [Item(str(number), asked) for number, asked in requests.items()]
        asked = json.dumps([request.args for request in self._task.instances], default=str)
        self.settings = {"data": self._task.task_name, "requests_sha256": hashlib.sha256(asked.encode()).hexdigest()}
        self._text = ReadOnce()

    def ask(self, llm: Llama, item: Item) -> dict[str, Any]:
        """The harness's metrics; answer: the likeliest choice, whether the target is the likeliest, or the text."""
        requests: Sequence[Any] = item.content
        answer: Any
        if requests[0].request_type == "generate_until":
            (request,) = requests
            answer, n = self._generated(llm, *request.args)
            request.resps = [answer]
            self._task._instances = requests
            self._task.apply_filters()
            results: list[Any] = [next(iter(request.filtered_resps.values()))]
        else:
            results, n = self._likelihoods(llm, [request.args for request in requests])
            logp = [logp for logp, _ in results]
            answer = int(np.argmax(logp)) if len(logp) > 1 else bool(results[0][1])
        found = self._task.process_results(requests[0].doc, results)
        scores = {metric: float(found[metric]) for metric in self.metrics}
        return {**scores, "answer": answer, "tokens": n, "tokens_in_codes": self._sealed}

    def _tokens(self, llm: Llama, text: str) -> list[int]:
        """Tokens of a text behind the token that begins one, whether the model asks for it or not."""
        tokens = list(llm.tokenize(text.encode(), add_bos=True, special=False)) if text else []
        start = llm.token_bos() if llm.token_bos() >= 0 else llm.token_eos()
        return tokens if tokens and tokens[0] == start else [start, *tokens]

    def needed(self, llm: Llama, item: Item) -> int:
        """Tokens of its longest context and of what follows."""
        if item.content[0].request_type == "generate_until":
            context, options = item.content[0].args
            return len(self._tokens(llm, context)) + self._most(options)
        return max(len(self._tokens(llm, "".join(request.args))) for request in item.content)

    @staticmethod
    def _most(options: Mapping[str, Any]) -> int:
        """Tokens of an answer, at most."""
        return int(options.get("max_gen_toks", MAX_TOKENS))

    def _read(self, llm: Llama, tokens: list[int]) -> None:
        self._text.read(llm, tokens)
        self._sealed = sealed_tokens(llm)

    def _likelihoods(self, llm: Llama, pairs: Sequence[tuple[str, str]]) -> tuple[list[tuple[float, bool]], int]:
        """Log-probability of each continuation behind its context and whether it is the likeliest; tokens read."""
        wholes = [self._tokens(llm, context + continuation) for context, continuation in pairs]
        # a tokenizer may join the end of a context and the start of what follows it
        starts = [common(self._tokens(llm, c), w[:-1]) for (c, _), w in zip(pairs, wholes, strict=True)]
        shared = min(common(*wholes), *starts)  # what all begin with; its last token is decoded with each of them
        results = []
        for whole, start in zip(wholes, starts, strict=True):
            self._read(llm, whole[: shared - 1])
            rest = whole[shared - 1 : -1]
            pieces = range(0, len(rest), llm.n_batch)
            rows = np.concatenate([log_probabilities(llm, rest[i : i + llm.n_batch], shared - 1 + i) for i in pieces])[
                start - shared :
            ]
            wanted = whole[start:]
            logp = float(rows[np.arange(len(wanted)), wanted].sum(dtype=np.float64))
            results.append((logp, bool((rows.argmax(1) == wanted).all())))
        return results, shared

    def _generated(self, llm: Llama, context: str, options: dict[str, Any]) -> tuple[str, int]:
        """The likeliest text behind a context, up to what ends it; tokens read."""
        tokens, most = self._tokens(llm, context), self._most(options)
        self._read(llm, tokens[:-1])
        made = greedy(llm, tokens[-1:], len(tokens) - 1, most)
        answer = llm.detokenize(made, prev_tokens=tokens).decode(errors="replace")
        until = options.get("until") or []
        for end in [until] if isinstance(until, str) else until:
            answer = answer.split(end)[0] if end else answer
        return answer, len(tokens)
