"""The file of answers: cut off anywhere, it is continued; damaged or of other settings, it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xquant_gguf.tasks.store import Answers

SETTINGS: dict[str, Any] = {"model": "m.gguf", "lengths": (1, 2)}
GIVEN: list[tuple[str, str, dict[str, Any]]] = [
    ("f16", "a", {"score": 0.5}),
    ("f16", "b", {"answer": "é\n\u2028"}),
    ("xquant", "a", {"score": 1.0}),
]


def fill(path: Path) -> None:
    with Answers(path, SETTINGS) as answers:
        for kv, item, answer in GIVEN:
            if answers.get(kv, item) is None:
                answers.add(kv, item, answer)


def test_cut_off_at_every_byte(tmp_path: Path) -> None:
    """A writer killed at any moment: the whole lines are kept, the rest is written again."""
    path = tmp_path / "answers.jsonl"
    fill(path)
    whole = path.read_bytes()
    assert whole.count(b"\n") == 4
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with Answers(path, SETTINGS) as answers:
            found = [answers.get(kv, item) for kv, item, _ in GIVEN]
        kept = max(whole[:n].count(b"\n") - 1, 0)
        assert found == [answer for *_, answer in GIVEN[:kept]] + [None] * (3 - kept)
        fill(path)
        assert path.read_bytes() == whole


def test_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    fill(path)
    before = path.read_bytes()
    for other, message in (
        ({**SETTINGS, "model": "n.gguf"}, "model 'm.gguf', not 'n.gguf'"),
        ({"model": "m.gguf"}, r"lengths \[1, 2\], not None"),
        ({**SETTINGS, "seed": 3}, "seed None, not 3"),
    ):
        with pytest.raises(ValueError, match=f"answers.jsonl holds answers with {message}"):
            Answers(path, other)
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"kv": "f16"}', "\udcff"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "answers.jsonl"
    fill(path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = line.encode(errors="surrogateescape") + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=r"answers.jsonl, line 3: must be a JSON object with answer, item, kv"):
        Answers(path, SETTINGS)
    assert path.read_bytes() == b"".join(lines)


def test_an_answer_is_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with Answers(path, SETTINGS) as answers:
        for n, given in enumerate(GIVEN):
            answers.add(*given)
            assert path.read_bytes().count(b"\n") == n + 2


def test_in_memory() -> None:
    with Answers(None, SETTINGS) as answers:
        answers.add("f16", "a", {"score": 1})
        assert answers.get("f16", "a") == {"score": 1}
        assert answers.get("f16", "b") is None
