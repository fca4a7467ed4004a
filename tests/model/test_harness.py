"""Tasks of lm-evaluation-harness, of our own questions in files; needs that package, which no other test does."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xquant_gguf import Llama
from xquant_gguf.evaluate import log_probabilities
from xquant_gguf.tasks import run, task_of

QUESTIONS = [
    {"question": f"Is {n} more than {m}?", "choices": ["no", "yes", "perhaps it is"], "answer": int(n > m)}
    for n in (3, 14, 159) for m in (2, 65)
]  # fmt: skip
TASK = """task: ours
dataset_path: json
dataset_kwargs: {data_files: {test: %s, train: %s}}
training_split: train
test_split: test
fewshot_split: train
output_type: %s
doc_to_text: "Q: {{question}}\\nA:"
"""
CHOICE = """doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WORDS = """doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]
"""
OPTIONS: dict[str, Any] = {"n_ctx": 2048, "n_ubatch": 128, "n_batch": 128, "n_threads": 1, "n_threads_batch": 1}


def test_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ImportError, match=r"pip install 'xquant-gguf\[harness\]'"):
        task_of("harness", {"data": "arc_easy"})


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with questions, for tests that need the package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of other packages
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        pytest.importorskip("lm_eval")
        (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(q)}\n" for q in QUESTIONS))
        (tmp_path / "shots.jsonl").write_text("".join(f"{json.dumps(q)}\n" for q in QUESTIONS * 5))
        yield tmp_path


def written(folder: Path, kind: str, rest: str) -> str:
    path = folder / "ours.yaml"
    path.write_text(TASK % (folder / "data.jsonl", folder / "shots.jsonl", kind) + rest)
    return str(path)


def test_multiple_choice(tiny: str, harness: Path) -> None:
    """Log-probabilities by hand, each choice read in one go; the shots are there, and read from codes."""
    task = task_of("harness", {"data": written(harness, "multiple_choice", CHOICE), "shots": 4})
    assert task.metrics == ("acc", "acc_norm")
    assert [item.name for item in task.items] == [str(i) for i in range(len(QUESTIONS))]
    llm = Llama(tiny, kv_type="f16", flash_attn=True, verbose=False, **OPTIONS)
    for item, question in zip(task.items, QUESTIONS, strict=True):
        got = task.ask(llm, item)
        logp = []
        for request in item.content:
            context, choice = request.args
            assert context.count("Q: ") == 5
            prefix = llm.tokenize(context.encode())
            tokens = prefix + llm.tokenize(choice.encode(), add_bos=False)[-len(choice.encode()) :]
            llm.session.clear()
            rows = np.concatenate([log_probabilities(llm, tokens[i : i + 128], i) for i in range(0, len(tokens), 128)])
            logp.append(sum(float(rows[i - 1, tokens[i]]) for i in range(len(prefix), len(tokens))))
        assert got["answer"] == int(np.argmax(logp))
        assert got["acc"] == (np.argmax(logp) == question["answer"])
        lengths = [len(choice) for choice in question["choices"]]  # type: ignore[attr-defined]
        assert got["acc_norm"] == (np.argmax(np.array(logp) / lengths) == question["answer"])
    llm.close()


def test_a_run(tiny: str, harness: Path) -> None:
    task = task_of("harness", {"data": written(harness, "multiple_choice", CHOICE), "shots": 29, "limit": 4})
    with pytest.raises(ValueError, match=r"--n-ctx is 512, must be at least \d+ for item \d of"):
        run(tiny, task, ["f16"], n_ctx=512, n_ubatch=128, n_threads=1, progress=False)
    out = run(tiny, task, ["f16", "xquant-tiny"], n_ctx=2048, n_ubatch=128, n_threads=1, progress=False)
    f16, other = out["results"]
    assert (f16["n"], f16["same_as_f16"], f16["p"]) == (4, 1, 1)
    assert other["tokens_in_codes"] > 256
    assert math.isclose(other["acc"], f16["acc"] + (other["better"] - other["worse"]) / 4)


def test_words(tiny: str, harness: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers in words end where the task says; the harness compares them."""
    task = task_of("harness", {"data": written(harness, "generate_until", WORDS), "shots": 0})
    llm = Llama(tiny, kv_type="f16", flash_attn=True, verbose=False, **OPTIONS)
    answers = iter([b" no\nQ: more", b"yes", b"no", b"no", b"yes", b"yes"])
    monkeypatch.setattr(llm, "detokenize", lambda *_, **__: next(answers))
    given = [task.ask(llm, item) for item in task.items]
    assert [answer["answer"] for answer in given] == [" no", "yes", "no", "no", "yes", "yes"]
    # Is 3 more than 2, 3 than 65, 14 than 2, 14 than 65, 159 than 2, 159 than 65?
    assert [answer["exact_match"] for answer in given] == [0, 0, 0, 1, 1, 1]
    llm.close()


def test_bad_names(harness: Path) -> None:
    with pytest.raises(ValueError, match="--data is 'no-such-task', must be a single task of"):
        task_of("harness", {"data": "no-such-task"})
    (harness / "empty.yaml").write_text("tusk: ours\n")
    with pytest.raises(ValueError, match=r"empty.yaml: has no line task: NAME"):
        task_of("harness", {"data": str(harness / "empty.yaml")})
    rest = CHOICE.replace("[{metric: acc}, {metric: acc_norm}]", "[{metric: mcc}]")
    with pytest.raises(ValueError, match="must be a task with one of the metrics acc, acc_norm"):
        task_of("harness", {"data": written(harness, "multiple_choice", rest)})
    with pytest.raises(ValueError, match=r"--data .*ours.yaml, --shots 99: "):
        task_of("harness", {"data": written(harness, "multiple_choice", CHOICE), "shots": 99})
