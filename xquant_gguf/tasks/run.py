"""Runs a task on every KV type, one after the other, and adds up the answers."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from xquant_gguf.evaluate import load
from xquant_gguf.kv_types import checked_kv_type, type_and_plan
from xquant_gguf.llama import Llama
from xquant_gguf.tasks.generate import Generate
from xquant_gguf.tasks.harness import Harness
from xquant_gguf.tasks.humaneval import HumanEval
from xquant_gguf.tasks.longbench import LongBench
from xquant_gguf.tasks.needles import Needles
from xquant_gguf.tasks.paired import paired
from xquant_gguf.tasks.passkey import PassKey
from xquant_gguf.tasks.store import Answer, Answers
from xquant_gguf.tasks.task import Item, Task
from xquant_gguf.tasks.truthfulqa import TruthfulQA

TASKS: dict[str, Callable[..., Task]] = {
    task.name: task for task in (TruthfulQA, LongBench, HumanEval, Harness, Generate, PassKey, Needles)
}
"""Tasks by name; the parameters of each are its options."""


def task_of(name: str, options: Mapping[str, Any]) -> Task:
    """The named task with these options, of which None is none; ValueError names one that it does not have."""
    known = signature(TASKS[name]).parameters
    given = {key: value for key, value in options.items() if value is not None}
    for key in sorted(set(given) - set(known)):
        raise ValueError(f"--{key.replace('_', '-')} is no option of --task {name}: leave it out")
    if "data" in known and known["data"].default is Parameter.empty and "data" not in given:
        raise ValueError(f"--task {name} needs --data FILE")
    return TASKS[name](**given)


def run(
    model_path: str,
    task: Task,
    kv_types: Sequence[str],
    *,
    n_ctx: int,
    n_ubatch: int = 512,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
    answers_path: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Asks every item of every cache type; each answer is kept in answers_path at once, and never asked for twice.

    kv_types: names of Llama's kv_type, or JSON files with plans.  n_ctx: tokens of the context; 0: as many as the model
    was trained with.  n_gpu_layers: layers on the GPU, -1: all.  Returns {"metric", "results": [one dictionary a type],
    "items", settings...}; a result has n, score (the metric named first), every metric with its standard error, and, if
    "f16" is among the types, how often the answer is that of F16, on how many items the score is worse and better than
    F16's, and how likely that is by chance (xquant_gguf.tasks.paired).  Raises ValueError if answers_path has answers
    to other settings.  Warns if nothing was read from an XQuant cache's codes.
    """
    common: dict[str, Any] = {"n_ctx": n_ctx, "n_batch": n_ubatch, "n_ubatch": n_ubatch, "verbose": False}
    common.update(n_threads=n_threads, n_threads_batch=n_threads, n_gpu_layers=n_gpu_layers)
    model = Path(model_path)
    if not model.exists():
        raise ValueError(f"Model path does not exist: {model}")
    if not task.items:
        raise ValueError(f"--task {task.name}: there are no items to ask")
    asked = {"model": model.name, "model_bytes": model.stat().st_size, "task": task.name}
    settings = {**asked, "n_ctx": n_ctx, "n_ubatch": n_ubatch, "kernels": Llama.kernels()}
    settings |= {"n_gpu_layers": n_gpu_layers, **task.settings}
    kv_types = list(dict.fromkeys(kv_types))
    if task.beside_f16:
        kv_types = ["f16", *(kv for kv in kv_types if kv != "f16")]
    for kv in kv_types:  # a wrong name is told now, not after hours of the others
        checked_kv_type(*type_and_plan(kv), {})
    given: dict[str, list[Answer]] = {}
    caches: dict[str, dict[str, Any]] = {}
    with (
        Answers(answers_path, settings) as answers,
        tqdm(total=len(kv_types) * len(task.items), unit="item", disable=not progress) as bar,
    ):
        for kv in kv_types:
            bar.set_description(kv)
            llm = load(model_path, kv, common)
            if kv == kv_types[0]:
                _check_context(llm, task)
            f16 = given.get("f16", [None] * len(task.items)) if task.beside_f16 else [None] * len(task.items)
            given[kv] = [
                _answer(llm, _version(kv), task, item, answers, bar, beside)
                for item, beside in zip(task.items, f16, strict=True)
            ]
            caches[kv] = llm.kv_cache_info()
            if llm.is_xquant and not any(answer["tokens_in_codes"] for answer in given[kv]):
                warnings.warn(f"{kv}: no page was sealed, the whole cache was F16: ask for more context", stacklevel=2)
            llm.close()

    results = [{"kv_type": kv, **_scores(task, given[kv], given.get("f16")), **_size(caches[kv])} for kv in kv_types]
    items = [
        {"item": item.name, **{kv: {metric: given[kv][i][metric] for metric in task.metrics} for kv in kv_types}}
        for i, item in enumerate(task.items)
    ]
    return {"metric": task.metrics[0], "results": results, **task.details(given), "items": items, **settings}


def _check_context(llm: Llama, task: Task) -> None:
    """ValueError if there is an item that the context is too small for."""
    if llm.n_ctx() < task.least_ctx:
        raise ValueError(f"--n-ctx is {llm.n_ctx()}, must be at least {task.least_ctx} for this task")
    needed, name = max((task.needed(llm, item), item.name) for item in task.items)
    if needed > llm.n_ctx():
        raise ValueError(f"--n-ctx is {llm.n_ctx()}, must be at least {needed} for item {name} of this task")


def _version(kv: str) -> str:
    """What answers are filed under: the KV type, or a plan's file with a hash of what it says."""
    return f"{kv} {hashlib.sha256(Path(kv).read_bytes()).hexdigest()[:16]}" if kv.endswith(".json") else kv


def _answer(llm: Llama, kv: str, task: Task, item: Item, answers: Answers, bar: Any, f16: Answer | None) -> Answer:
    answer = answers.get(kv, item.name)
    if answer is None:
        answer = task.ask(llm, item)
        if task.beside_f16:
            answer.update(task.follow(llm, item, (f16 or answer)["answer"]))
        answers.add(kv, item.name, answer)
    bar.update()
    return answer


def _scores(task: Task, given: Sequence[Answer], f16: Sequence[Answer] | None) -> dict[str, float]:
    """Means and standard errors of the metrics, and of how near the answers are to F16's."""
    out: dict[str, float] = {"n": len(given), "score": _mean([a[task.metrics[0]] for a in given])}
    for metric in task.metrics:
        values = [a[metric] for a in given]
        out[metric], out[f"{metric}_stderr"] = _mean(values), _stderr(values)
    if f16 is not None:
        near = [task.compare(a["answer"], b["answer"]) for a, b in zip(given, f16, strict=True)]
        out.update({name: _mean([n[name] for n in near]) for name in near[0]})
        out.update(paired([a[task.metrics[0]] for a in given], [b[task.metrics[0]] for b in f16]))
    return {**out, **{name: _mean([a[name] for a in given]) for name in ("tokens", "tokens_in_codes")}}


def _size(info: Mapping[str, Any]) -> dict[str, float]:
    return {
        "true_bits": info["true_bits"],
        "equivalent_bits": info["equivalent_bits"],
        "kv_bytes": info["bytes_allocated"],
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _stderr(values: Sequence[float]) -> float:
    """Standard error of the mean; that of a single value is unknown: 0."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
