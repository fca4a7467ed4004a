"""Tasks on tiny models: the scores by hand, the prompts, and that an answer depends on nothing asked before."""

from __future__ import annotations

import json
import math
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xquant_gguf import Llama
from xquant_gguf.cli import main
from xquant_gguf.evaluate import log_probabilities
from xquant_gguf.tasks import run, task_of
from xquant_gguf.tasks.longbench import LongBench, rouge_l
from xquant_gguf.tasks.model import chat_prompt, greedy_answer
from xquant_gguf.tasks.passkey import KEY, MAX_TOKENS, PassKey
from xquant_gguf.tasks.truthfulqa import TruthfulQA, scores

PRIMER = "Q: Is snow cold?\nA: Yes, snow is cold.\n\n" * 16
HEAD = "Type,Question,Best Answer,Correct Answers,Incorrect Answers\n"
QUESTIONS = HEAD + (
    "x,Is it day?,Yes; it is,No one knows; Yes; it is,It is not; Never\n"
    'x,"Who, then?",Nobody,Nobody,Somebody; Someone; Everyone of those who came along on that long day\n'
    "x,Why?,Because,Because; For a reason; Who knows,Thus\n"
)
OPTIONS: dict[str, Any] = {"n_ctx": 2048, "n_ubatch": 128, "n_batch": 128, "n_threads": 2, "verbose": False}


@pytest.fixture
def questions(tmp_path: Path) -> TruthfulQA:
    path = tmp_path / "questions.csv"
    path.write_text(QUESTIONS)
    task = TruthfulQA(str(path))
    task.settings["primer"] = PRIMER
    return task


def detokenized(llm: Llama, tokens: list[int]) -> str:
    """Text of a tiny model's tokens, whose byte tokens spell a space as its stand-in."""
    return llm.detokenize(tokens).decode().replace("\u2581", " ")


def test_multiple_choice_scores_on_numbers() -> None:
    """Best 0.3, true 0.1, false 0.2 and 0.4: MC1 is lost to 0.4, the true answers have 0.4 of 1.0."""
    assert scores(np.log([0.3, 0.1, 0.2, 0.4]), 2) == {"mc1": 0.0, "mc2": pytest.approx(0.4)}
    assert scores(np.log([0.3, 0.6, 0.2, 0.1]) - 900, 2) == {"mc1": 1.0, "mc2": pytest.approx(0.75)}


def test_answers_of_a_question(questions: TruthfulQA) -> None:
    first = questions.items[0].content
    assert first.true == ("Yes; it is", "No one knows", "Yes", "it is")
    assert first.false == ("It is not", "Never")
    assert questions.items[2].content.true == ("Because", "For a reason", "Who knows")


def test_truthfulqa_is_the_sum_of_log_probabilities(f16: Llama, questions: TruthfulQA) -> None:
    """Each choice is read in one go after primer and question, without any cut of the cache."""
    for item in questions.items:
        got = questions.ask(f16, item)
        logp = []
        for choice in (*item.content.true, *item.content.false):
            prefix = f16.tokenize(PRIMER.encode())
            prefix += f16.tokenize(f"\n\nQ: {item.content.text}\nA:".encode(), add_bos=False)
            answer = f16.tokenize(f" {choice}".encode(), add_bos=False)
            assert got["tokens"] == len(prefix)
            f16.session.clear()
            tokens, rows = prefix + answer, []
            for i in range(0, len(tokens), 128):
                rows.append(log_probabilities(f16, tokens[i : i + 128], i))
            table = np.concatenate(rows)
            logp.append(sum(float(table[len(prefix) + i - 1, t]) for i, t in enumerate(answer)))
        expected = scores(np.array(logp), len(item.content.true))
        assert got["mc1"] == expected["mc1"]
        assert got["mc2"] == pytest.approx(expected["mc2"], rel=0.02)
        assert got["answer"] == int(np.argmax(logp))


def test_an_answer_does_not_depend_on_the_ones_before(tiny: str, questions: TruthfulQA, prose: str) -> None:
    """What a longer question or answer sealed is open again for the next one, prompts are read anew."""
    llm = Llama(tiny, kv_type="xquant", **OPTIONS)
    a, b, c = questions.items
    forward = [questions.ask(llm, item) for item in (a, b, c)]
    assert [questions.ask(llm, item) for item in (c, b, a)] == forward[::-1]
    assert all(answer["tokens_in_codes"] >= 256 for answer in forward)
    tokens = llm.tokenize(prose.encode())
    first = greedy_answer(llm, tokens[:700], 8)
    greedy_answer(llm, tokens[:900], 8)
    assert greedy_answer(llm, tokens[:700], 8) == first
    llm.close()


def test_a_question_that_does_not_fit(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.csv"
    path.write_text(HEAD + f"x,{'why ' * 400}?,Yes,Yes,No\n")
    with pytest.raises(ValueError, match=r"--n-ctx is 2048, must be at least \d{4} for item 0 of"):
        run(tiny, TruthfulQA(str(path)), ["f16"], n_ctx=2048, progress=False)


def test_greedy_answer_is_the_argmax(f16: Llama) -> None:
    prompt = f16.tokenize(b"The answer is")
    tokens: list[int] = []
    for _ in range(6):
        f16.session.clear()
        tokens.append(int(log_probabilities(f16, prompt + tokens, 0)[-1].argmax()))
    assert greedy_answer(f16, prompt, 6) == f16.detokenize(tokens).decode(errors="replace").strip()


def test_chat_template_where_there_is_one(smollm2: str, f16: Llama) -> None:
    assert chat_prompt(f16, "Why?") == f16.tokenize(b"Why?")
    llm = Llama(smollm2, kv_type="f16", n_ctx=256, verbose=False)
    text = llm.detokenize(chat_prompt(llm, "Why?"), special=True).decode()
    assert text.endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    llm.close()


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_passkey_prompt(f16: Llama, depth: float) -> None:
    """The key stands at its depth, the filler has no number, the length is met to a sentence."""
    (item, other) = PassKey(lengths=[1024], depths=[depth], repeats=2).items
    tokens, key = PassKey().prompt(f16, item)
    assert 1024 - MAX_TOKENS - 110 < len(tokens) <= 1024 - MAX_TOKENS
    text = detokenized(f16, tokens)
    hidden = KEY.format(key)
    before, after = text.split(hidden)
    assert not re.search(r"[0-9]", before + after)
    filler = before.count("The "), after.count("The ")
    assert filler[0] / sum(filler) == pytest.approx(depth, abs=0.06)
    assert PassKey().prompt(f16, item) == (tokens, key)
    assert PassKey(seed=1).prompt(f16, item)[1] != key
    assert PassKey().prompt(f16, other)[1] != key


def test_passkey_is_found_in_the_answer(f16: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    task = PassKey(lengths=[512], depths=[0.5, 1.0], repeats=2)
    keys = [task.prompt(f16, item)[1] for item in task.items]
    answers = iter([f"It is {keys[0]}.", "12", keys[2], "I do not know"])
    monkeypatch.setattr("xquant_gguf.tasks.passkey.greedy_answer", lambda *_: next(answers))
    given = [task.ask(f16, item) for item in task.items]
    assert [answer["found"] for answer in given] == [1, 0, 1, 0]
    rows = task.details({"f16": given})["table"]
    assert [(r["length"], r["depth"], r["found"], r["n"]) for r in rows] == [(512, 0.5, 1, 2), (512, 1.0, 0, 2)]


def test_rouge_l_by_hand() -> None:
    """Longest common subsequence a, c, d: precision and recall 3/4; the best reference counts."""
    assert rouge_l("a b c d", ["a c d e"]) == pytest.approx(0.75)
    assert rouge_l("a b c d", ["x", "a b c d"]) == 1.0


def test_longbench_cuts_the_middle(f16: Llama, tmp_path: Path) -> None:
    context = "Beginning. " + "filler words go here " * 200 + "The end."
    path = tmp_path / "news.jsonl"
    path.write_text(json.dumps({"context": context, "answers": ["a summary"]}) + "\n")
    task = LongBench(str(path), max_tokens=100)
    tokens = task.prompt(f16, context)
    text = detokenized(f16, tokens)
    assert 2048 - 100 - 4 <= len(tokens) <= 2048 - 100
    assert "\n\nBeginning. filler" in text
    assert "here The end.\n\nSummarize" in text
    assert context not in text
    assert "\n\nshort one\n\n" in detokenized(f16, task.prompt(f16, "short one"))
    assert task.compare("a b c d", "a c d e") == {"same_as_f16": 0.0, "rouge_l_to_f16": pytest.approx(0.75)}


def test_longbench_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match=r"pip install 'xquant-gguf\[tasks\]'"):
        task_of("longbench", {"data": "news.jsonl"})


class Stop(Exception):
    """Stands for a killed process."""


def test_a_stopped_run_goes_on(tiny: str, questions: TruthfulQA, tmp_path: Path) -> None:
    """Stopped after any number of answers, it asks the others only, and comes to the same result."""
    kv_types, ask = ["f16", "xquant-tiny"], questions.ask
    whole = run(tiny, questions, kv_types, n_ctx=2048, n_ubatch=128, progress=False)
    asked: list[str] = []
    stops = {2, 5}

    def counted(llm: Llama, item: Any) -> dict[str, Any]:
        if len(asked) in stops:
            stops.remove(len(asked))
            raise Stop
        asked.append(f"{llm.kv_cache_info()['preset']} {item.name}")
        return ask(llm, item)

    questions.ask = counted  # type: ignore[method-assign]
    path = tmp_path / "out.items.jsonl"
    while stops:
        with pytest.raises(Stop):
            run(tiny, questions, kv_types, n_ctx=2048, n_ubatch=128, answers_path=path, progress=False)
    resumed = run(tiny, questions, kv_types, n_ctx=2048, n_ubatch=128, answers_path=path, progress=False)
    assert asked == [f"{kv} {i}" for kv in kv_types for i in range(3)]
    assert resumed == whole
    first, tiny_row = whole["results"]
    assert first["n"] == 3
    assert first["same_as_f16"] == 1
    assert first["score"] == first["mc1"] == sum(i["f16"]["mc1"] for i in whole["items"]) / 3
    values = [i["xquant-tiny"]["mc2"] for i in whole["items"]]
    assert tiny_row["mc2_stderr"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(3))
    assert tiny_row["true_bits"] == 1.75
    with pytest.raises(ValueError, match="holds answers with n_ubatch 128, not 256"):
        run(tiny, questions, kv_types, n_ctx=2048, n_ubatch=256, answers_path=path, progress=False)


def test_a_changed_plan_is_asked_again(tiny: str, tmp_path: Path) -> None:
    plan, path = tmp_path / "plan.json", tmp_path / "answers.jsonl"
    task = PassKey(lengths=[512], depths=[0.5])
    for window in (128, 0, 0):
        plan.write_text(json.dumps({"preset": "xquant", "window": window}))
        out = run(tiny, task, [str(plan)], n_ctx=1024, n_ubatch=128, answers_path=path, progress=False)
    assert len(path.read_text().splitlines()) == 1 + 2
    assert out["results"][0]["tokens_in_codes"] == 256  # pages 1 and 2: page 0 is pinned, 3 is open


def test_a_cache_that_never_sealed_is_told(tiny: str) -> None:
    task = PassKey(lengths=[256], depths=[0.5])
    with pytest.warns(UserWarning, match="xquant: no page was sealed"):
        run(tiny, task, ["xquant"], n_ctx=512, n_ubatch=512, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tiny, task, ["f16"], n_ctx=512, n_ubatch=512, progress=False)


def test_passkey_command(tiny: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "keys.json"
    options = ["--n-ctx", "1024", "--n-ubatch", "128", "--lengths", "512,1024", "--depths", "0,1", "--json", str(out)]
    assert main(["evaluate", tiny, "--task", "passkey", "--kv-types", "f16,xquant", *options]) == 0
    printed = capfd.readouterr().out
    assert re.search(r"^xquant +3.25 +4 +0.000 +0.000 ", printed, re.MULTILINE)
    assert re.search(r"^found, by depth +tokens +0 +1$", printed, re.MULTILINE)
    assert re.search(r"^xquant +1024 +0/1 +0/1$", printed, re.MULTILINE)
    result = json.loads(out.read_text())
    assert (result["task"], result["metric"], len(result["items"]), len(result["table"])) == ("passkey", "found", 4, 8)
    assert {"kv_type", "n", "score", "same_as_f16", "true_bits"} <= set(result["results"][1])
    assert len((tmp_path / "keys.items.jsonl").read_text().splitlines()) == 1 + 8


def test_longbench_command(tiny: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    news, out = tmp_path / "news.jsonl", tmp_path / "news.json"
    entry = {"context": "News of today. " * 60, "answers": ["a b"]}
    news.write_text(f"{json.dumps(entry)}\n" * 3)
    options = ["--data", str(news), "--limit", "2", "--max-tokens", "8", "--n-ctx", "1024", "--n-ubatch", "128"]
    options += ["--kv-types", "f16,xquant", "--json", str(out)]
    assert main(["evaluate", tiny, "--task", "longbench", *options]) == 0
    assert re.search(r"^KV cache .* rouge_l_to_f16 ", capfd.readouterr().out, re.MULTILINE)
    f16, xquant = json.loads(out.read_text())["results"]
    assert (f16["rouge_l_to_f16"], f16["n"], xquant["n"]) == (1, 2, 2)
    # 1014 tokens: the last micro-batch began at 896, its window at 768; page 0 is pinned
    assert (f16["tokens_in_codes"], xquant["tokens_in_codes"]) == (0, 5 * 128)


BAD: list[tuple[list[str], str]] = [
    (["--kv-types", "f16"], "name a text with --text FILE, or a task with --task"),
    (["--task", "passkey", "--kv-types", "f16,nope"], "kv_type is 'nope', must be one of"),
    (["--task", "passkey", "--kv-types", "f16,no.json"], "kv_plan no.json: "),
    (["--task", "truthfulqa"], "--task truthfulqa needs --data FILE"),
    (["--task", "passkey", "--text", "x"], "--text is no option of a task"),
    (["--task", "passkey", "--data", "x"], "--data is no option of --task passkey"),
    (["--task", "longbench", "--lengths", "256"], "--lengths is no option of --task longbench"),
    (["--task", "passkey", "--depths", "0.5,2"], "--depths has 2.0, must be from 0 to 1"),
    (["--task", "passkey", "--depths", "nan"], "--depths has nan, must be from 0 to 1"),
    (["--task", "passkey", "--lengths", "100"], "--lengths has 100, must be at least 256"),
    (["--task", "passkey", "--lengths", "2048", "--n-ctx", "1024"], "--n-ctx is 1024, must be at least 2048"),
    (["--task", "truthfulqa", "--data", "FILE", "--limit", "1"], "there is no column 'Question'"),
    (["--task", "longbench", "--data", "FILE"], "line 1: is not JSON"),
    (["--task", "truthfulqa", "--data", "no-such-file"], "no-such-file"),
    (["--task", "needles", "--needles", "99"], "--needles is 99, must be from 1 to 28"),
    (["--task", "needles", "--lengths", "300"], "--lengths has 300, must be at least 512 for 8 needles"),
    (["--task", "needles", "--depths", "0.5"], "--depths is no option of --task needles"),
    (
        ["--task", "humaneval", "--data", "FILE"],
        "--task humaneval runs code that a model wrote: say so with --run-code",
    ),
    (["--task", "humaneval", "--run-code"], "--task humaneval needs --data FILE"),
    (["--task", "humaneval", "--run-code", "--data", "FILE"], "line 1: is not JSON"),
    (["--task", "generate", "--data", "FILE"], "line 1: is not JSON"),
    (["--task", "passkey", "--run-code"], "--run-code is no option of --task passkey"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_errors_are_one_line(
    tiny: str, tmp_path: Path, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.write_text("a,b\n1,2\n")
    assert main(["evaluate", tiny, *(str(data) if a == "FILE" else a for a in arguments)]) == 1
    err = capfd.readouterr().err.strip().splitlines()
    assert err[-1].startswith("xquant-gguf: ")
    assert message in err[-1]


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("truthfulqa", HEAD + "x,Why?,,,No\n", "line 2: question, best and incorrect answers must not be empty"),
        ("truthfulqa", HEAD + "x,Why?,Yes\n", "line 2: question, best and incorrect answers must not be empty"),
        ("longbench", '{"context": "a", "answers": ["b"]}\n{"context": 1}\n', "line 2: context must be a text"),
        ("longbench", '{"context": "a", "answers": []}\n', "line 1: answers must be a list of at least one text"),
        ("longbench", "[]\n", "line 1: context must be a text"),
    ],
)
def test_damaged_data(task: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        task_of(task, {"data": str(path)})
