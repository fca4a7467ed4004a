"""Data files of tasks: what ends a line, and what does not although Python's splitlines says so."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from xquant_gguf.tasks import task_of
from xquant_gguf.tasks.generate import built_in_prompts, distinct, parted, read_prompts
from xquant_gguf.tasks.humaneval import GROUP, code_of, read_problems
from xquant_gguf.tasks.longbench import read_documents
from xquant_gguf.tasks.task import read_data
from xquant_gguf.tasks.truthfulqa import read_questions

NO_ENDS = "\u2028\u2029\x85"
PATH = Path("data")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_json_lines_end_at_line_feeds_alone(end: str, last: bool) -> None:
    documents = [{"context": f"one{c}two", "answers": [f"yes{c}no"]} for c in NO_ENDS]
    text = end.join(json.dumps(d, ensure_ascii=False) for d in documents) + (end if last else "")
    assert read_documents(PATH, text) == documents


def test_lines_are_counted_as_editors_do() -> None:
    good = json.dumps({"context": f"one{NO_ENDS}", "answers": ["yes"]}, ensure_ascii=False)
    for bad in ("{", ""):
        with pytest.raises(ValueError, match="data, line 2: is not JSON"):
            read_documents(PATH, f"{good}\n{bad}\n{good}\n")
    assert read_documents(PATH, "") == []


@pytest.mark.parametrize("quote", ['"', ""])
def test_csv_lines_end_at_line_feeds_alone(quote: str) -> None:
    row = ",".join(f"{quote}{words}{quote}" for words in (f"why{NO_ENDS}?", "best", "best; also", "no; never"))
    text = f"Question,Best Answer,Correct Answers,Incorrect Answers\r\n{row}\r\n"
    (question,) = read_questions(PATH, text)
    assert question.text == f"why{NO_ENDS}?"
    assert (question.true, question.false) == (("best", "also"), ("no", "never"))


def test_compressed_files(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    raw = gzip.compress("é\n".encode())
    path.write_bytes(raw)
    settings = {"data": "data.jsonl.gz", "data_sha256": hashlib.sha256(raw).hexdigest()}
    assert read_data(str(path)) == ("é\n", settings)
    for damaged in (b"plain", raw[:-4], raw[:12] + b"\xff" + raw[13:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"data.jsonl.gz: must be compressed by gzip, as its name says"):
            read_data(str(path))


def problem(number: int, **other: object) -> dict[str, object]:
    """A problem of our own in the benchmark's format."""
    prompt = f'def f{number}(x):\n    """x and {number}"""\n'
    test = f"def check(f):\n    assert f(1) == {1 + number}\n"
    return {"task_id": f"ours/{number}", "prompt": prompt, "entry_point": f"f{number}", "test": test, **other}


def test_problems_and_their_modules() -> None:
    text = "".join(f"{json.dumps(problem(i))}\n" for i in range(GROUP + 2))
    problems = read_problems(PATH, text)
    assert list(problems) == [f"ours/{i}" for i in range(GROUP + 2)]
    assert problems["ours/1"].module == tuple(problems[f"ours/{i}"].prompt for i in range(GROUP))
    assert problems[f"ours/{GROUP}"].module == tuple(problems[f"ours/{GROUP + i}"].prompt for i in range(2))
    assert (problems["ours/1"].name, problems["ours/1"].test) == ("f1", problem(1)["test"])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (problem(1, prompt=" "), "line 2: prompt is ' ', must be a text that is not empty"),
        (problem(1, test=3), "line 2: test is 3, must be a text that is not empty"),
        (problem(1, entry_point="f(1)"), r"line 2: entry_point is 'f\(1\)', must be a Python name"),
        (problem(0), "line 2: task_id is 'ours/0', as in a line before"),
        ([], "line 2: task_id is None, must be a text that is not empty"),
    ],
)
def test_damaged_problems(second: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"data, {message}"):
        read_problems(PATH, f"{json.dumps(problem(0))}\n{json.dumps(second)}\n")


def test_code_is_run_if_the_user_says_so(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(problem(0)))
    with pytest.raises(ValueError, match="--task humaneval runs code that a model wrote: say so with --run-code"):
        task_of("humaneval", {"data": str(path)})
    assert [item.name for item in task_of("humaneval", {"data": str(path), "run_code": True}).items] == ["ours/0"]


def test_code_of_an_answer() -> None:
    assert code_of("Sure:\n```python\nx = 1\n```\nor\n```\ny\n```") == "x = 1\n"
    assert code_of("```\nx = 1\n") == "x = 1\n"  # cut off
    assert code_of("x = 1") == "x = 1"


def test_prompts() -> None:
    assert read_prompts("data", '{"prompt": "a"}\n{"prompt": "b", "more": 1}') == ["a", "b"]
    with pytest.raises(ValueError, match="data, line 2: prompt is '', must be a text that is not empty"):
        read_prompts("data", '{"prompt": "a"}\n{"prompt": ""}')
    built_in = built_in_prompts()
    assert len(set(built_in)) == 8
    assert all(len(prompt) == 2000 for prompt in built_in)


def test_numbers_of_a_generation() -> None:
    assert distinct([1, 2, 3, 4, 5]) == 1
    assert distinct([1, 1, 1, 1, 1, 1]) == 1 / 3
    assert distinct([1, 2]) == 1
    assert parted([1, 2, 3], [1, 2, 3]) is None
    assert (parted([1, 2, 3], [1, 4, 3]), parted([1, 2], [1, 2, 3]), parted([2], [1]), parted([], [1])) == (1, 2, 0, 0)
