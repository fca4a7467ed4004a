"""Data files of tasks: what ends a line, and what does not although Python's splitlines says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xquant_gguf.tasks.longbench import read_documents
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
