"""Tasks whose items share a text, and generations beside F16's: on tiny models, whose answers are nonsense."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from xquant_gguf import Llama
from xquant_gguf.cli import main
from xquant_gguf.evaluate import log_probabilities
from xquant_gguf.tasks import humaneval, run
from xquant_gguf.tasks.generate import Generate, parted
from xquant_gguf.tasks.humaneval import HumanEval
from xquant_gguf.tasks.model import ReadOnce, chat_prompt, greedy
from xquant_gguf.tasks.needles import NEEDLE, Needles

OPTIONS: dict[str, Any] = {
    "n_ctx": 4096,
    "n_ubatch": 256,
    "n_batch": 256,
    "n_threads": 1,
    "n_threads_batch": 1,
    "verbose": False,
}
PROBLEMS = [
    {
        "task_id": f"ours/{name}",
        "prompt": f'import math\n\n\ndef {name}(x: int) -> int:\n    """{text}"""\n',
        "entry_point": name,
        "test": f"def check(candidate):\n    assert candidate(3) == {value}\n    assert math.pi > 3\n",
    }
    for name, text, value in (("double", "Twice x.", 6), ("square", "x times x.", 9), ("half", "Half of x.", 1))
]


@pytest.fixture
def problems(tmp_path: Path) -> str:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(f"{json.dumps(problem)}\n" for problem in PROBLEMS))
    return str(path)


def detokenized(llm: Llama, tokens: list[int]) -> str:
    """Text of a tiny model's tokens, whose byte tokens spell a space as its stand-in."""
    return llm.detokenize(tokens).decode().replace("\u2581", " ")


# ---- what tasks share ----


def test_what_stands_before_a_question_is_the_same(smollm2: str, f16: Llama) -> None:
    """Whatever the question is, and with or without a template; the message is the one without a cut."""
    llm = Llama(smollm2, kv_type="f16", n_ctx=256, verbose=False)
    for model in (llm, f16):
        texts = [model.detokenize(chat_prompt(model, "A text.\n\n", q), special=True) for q in ("Why?", "Say:why")]
        assert texts[0].replace(b"Why?", b"Say:why") == texts[1]
        assert chat_prompt(model, "A text. Why?") == chat_prompt(model, "A text.", " Why?")
    llm.close()


@pytest.mark.parametrize("kv_type", ["f16", "xquant"])
def test_a_text_is_read_once(tiny: str, prose: str, kv_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers behind it are those of a cache that has just read it, whatever was made of the cache in between."""
    llm = Llama(tiny, kv_type=kv_type, flash_attn=True, **OPTIONS)
    tokens = llm.tokenize(prose.encode())
    text, questions = tokens[:900], [tokens[1000:1010], tokens[1100:1400]]
    fresh = []
    for question in questions:
        llm.reset()
        llm.eval(text)
        fresh.append(greedy(llm, question, len(text), 8))
    read: list[int] = []
    evaluate = llm.eval

    def counted(tokens: list[int]) -> None:
        read.append(len(tokens))
        evaluate(tokens)

    monkeypatch.setattr(llm, "eval", counted)
    once = ReadOnce()
    for number in (0, 1, 0):
        once.read(llm, text)
        assert llm.session.length() == len(text)
        assert greedy(llm, questions[number], len(text), 8) == fresh[number]
    assert read == [900]
    once.read(llm, text[:500])
    assert (llm.session.length(), read) == (500, [900, 500])
    llm.close()


# ---- needles ----


def test_text_with_needles(f16: Llama) -> None:
    """Every needle once, in order and at its depth, no other number, as long as asked for; questions share it."""
    task = Needles(lengths=[3000], needles=4, repeats=2)
    texts = []
    for item in task.items:
        text, question, number = task.prompt(f16, item)
        assert 3000 - 24 - 64 - 110 < len(text) <= 3000 - 24 - 64
        assert len(text) + len(question) + 24 <= 3000
        told = detokenized(f16, text)
        length, repeat, n = item.content
        hidden, _ = task.hidden(length, repeat)
        assert re.findall("[0-9]+", told) == [pair[1] for pair in hidden]
        assert all(NEEDLE.format(*pair) in told for pair in hidden)
        assert number == hidden[n][1]
        assert hidden[n][0] in detokenized(f16, question)
        assert told.index(number) / len(told) == pytest.approx((n + 0.5) / 4, abs=0.05)
        texts.append(text)
    assert texts[:4] == [texts[0]] * 4
    assert texts[4:] == [texts[4]] * 4 != texts[:4]
    assert Needles(lengths=[3000], needles=4, seed=1).hidden(3000, 0)[0] != task.hidden(3000, 0)[0]


def test_needles_command(tiny: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    options = [
        "--lengths",
        "1024,2048",
        "--needles",
        "2",
        "--n-ctx",
        "2048",
        "--threads",
        "1",
        "--kv-types",
        "f16,xquant",
    ]
    assert main(["evaluate", tiny, "--task", "needles", *options, "--json", str(out)]) == 0
    printed = capfd.readouterr().out
    assert re.search(r"^KV cache .* worse +better +p +tokens", printed, re.MULTILINE)
    assert re.search(r"^found, by depth +tokens +0.25 +0.75$", printed, re.MULTILINE)
    assert re.search(r"^xquant +2048 +0/1 +0/1$", printed, re.MULTILINE)
    f16, xquant = json.loads(out.read_text())["results"]
    assert (xquant["n"], xquant["worse"], xquant["better"], xquant["p"], f16["p"]) == (4, 0, 0, 1, 1)
    assert xquant["tokens_in_codes"] > 0


# ---- generations ----


def test_generation_is_the_argmax(f16: Llama, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Once upon a time"}\n{"prompt": "x"}\n')
    task = Generate(str(path), max_tokens=6)
    for item in task.items:
        answer = task.ask(f16, item)["answer"]
        prompt = task.prompt(f16, item)
        made: list[int] = []
        for _ in answer:
            f16.session.clear()
            made.append(int(log_probabilities(f16, prompt + made, 0)[-1].argmax()))
        assert answer == made
        assert task.follow(f16, item, answer) == {"agree": 1.0}
        if answer:
            other = [*answer[:-1], (answer[-1] + 1) % 200]
            assert task.follow(f16, item, other) == {"agree": pytest.approx(1 - 1 / len(answer))}


def test_generations_beside_f16(tiny: str) -> None:
    """F16 is asked first, named or not; figures are those of the answers."""
    task = Generate(limit=2, max_tokens=60)
    out = run(tiny, task, ["xquant-tiny"], n_ctx=4096, n_ubatch=256, n_threads=1, progress=False)
    f16, other = out["results"]
    assert (f16["kv_type"], f16["agree"], f16["same_as_f16"], f16["same_part_to_f16"]) == ("f16", 1, 1, 1)
    assert other["kv_type"] == "xquant-tiny"
    assert 0 < other["agree"] < 1
    assert other["tokens_in_codes"] > 1000
    llm = Llama(tiny, kv_type="xquant-tiny", flash_attn=True, **OPTIONS)
    beside = Llama(tiny, kv_type="f16", flash_attn=True, **OPTIONS)
    at = []
    for item in task.items:
        found = parted(task.ask(llm, item)["answer"], task.ask(beside, item)["answer"])
        at.append(60 if found is None else found)
    assert out["parted"]["xquant-tiny"] == pytest.approx([min(at) * q + max(at) * (1 - q) for q in (0.75, 0.5, 0.25)])
    assert other["same_part_to_f16"] == pytest.approx(sum(at) / 120)
    rows = task.rows(out)
    assert [row[0] for row in rows[1:]] == ["f16", "xquant-tiny"]
    assert rows[1][1:] == ["60"] * 3
    llm.close()
    beside.close()


def test_what_does_not_fit_is_told_before_anything_is_asked(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest item decides, wherever it stands."""
    task = Generate(max_tokens=100)
    llm = Llama(tiny, n_ctx=512, verbose=False)
    needed = [task.needed(llm, item) for item in task.items]
    llm.close()
    n_ctx = (max(needed) - 1) // 256 * 256
    assert needed[0] < n_ctx
    monkeypatch.setattr(Generate, "ask", lambda *_: pytest.fail("an item was asked"))
    name = task.items[needed.index(max(needed))].name
    wanted = f"--n-ctx is {n_ctx}, must be at least {max(needed)} for item {name} of"
    with pytest.raises(ValueError, match=wanted):
        run(tiny, task, ["f16"], n_ctx=n_ctx, n_threads=1, progress=False)


# ---- HumanEval ----


def test_functions_are_run_on_their_tests(f16: Llama, problems: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right, wrong and missing functions, with the imports of the head in front; the module is read from codes."""
    answers = iter(
        ["```python\ndef double(x):\n    return 2 * x\n```", "def square(x):\n    return x", "I do not know"]
    )
    monkeypatch.setattr(humaneval, "text_of", lambda *_: next(answers))
    task = HumanEval(problems, max_tokens=4, run_code=True)
    given = [task.ask(f16, item) for item in task.items]
    assert [answer["passed"] for answer in given] == [1, 0, 0]
    assert given[1]["answer"] == "def square(x):\n    return x"


def test_module_of_problems(f16: Llama, problems: str) -> None:
    """All problems between our functions, in all questions alike; solutions are not in it."""
    task = HumanEval(problems, run_code=True)
    (first, rest), *others = [task.prompt(f16, item.content) for item in task.items]
    assert all(other[0] == first for other in others)
    text = detokenized(f16, first)
    at = [text.index(part) for part in ("def initials", "def double", "def square", "def half", "def minutes_open")]
    assert at == sorted(at)
    assert '"""x times x."""\n    ...\n' in text
    assert "`double`" in detokenized(f16, rest)
    limited = HumanEval(problems, limit=1, run_code=True)
    assert limited.prompt(f16, limited.items[0].content)[0] == first


def test_humaneval_command(tiny: str, problems: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    options = ["--data", problems, "--limit", "2", "--max-tokens", "4", "--threads", "1"]
    options += ["--kv-types", "f16,xquant", "--json", str(out)]
    assert main(["evaluate", tiny, "--task", "humaneval", "--run-code", *options]) == 0
    assert re.search(r"^xquant +3.25 +2 +0.000 +0.000 ", capfd.readouterr().out, re.MULTILINE)
    _, xquant = json.loads(out.read_text())["results"]
    # what stands behind the problems is longer than what stays open: all but the first page of them is codes
    assert xquant["tokens"] - xquant["tokens_in_codes"] < 128 + 256 + 128
    assert main(["evaluate", tiny, "--task", "humaneval", "--run-code", *options[:2], "--n-ctx", "1024"]) == 1
    assert re.search(r"--n-ctx is 1024, must be at least \d+ for item ours/\w+ of", capfd.readouterr().err)
