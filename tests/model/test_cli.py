"""The command xquant-gguf on SmolLM2."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest

from support.clock import Clock, seconds
from xquant_gguf import Llama, codec
from xquant_gguf.cli import main
from xquant_gguf.evaluate import evaluate


def test_generate(
    smollm2: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], prose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Llama generates, and the speeds at which it was read and generated."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(prose[:1500])
    llm = Llama(smollm2, kv_type="xquant", n_ctx=1024, verbose=False)
    tokens = llm.tokenize(prompt.read_bytes(), special=True)
    assert len(tokens) < llm.n_batch
    drawn = llm.generate(tokens, temp=0.0, repeat_penalty=1.1)
    text = llm.detokenize([token for token, _ in zip(drawn, range(5), strict=False)]).decode()
    llm.close()
    Clock(monkeypatch)
    assert main(["generate", smollm2, "--prompt-file", str(prompt), "--max-tokens", "5", "--n-ctx", "1024"]) == 0
    out = capfd.readouterr().out
    speeds = len(tokens) / seconds(len(tokens)), 1 / seconds(1)
    told = f"prompt {len(tokens)} tokens, {speeds[0]:.1f} tokens/s; decode 5 tokens, {speeds[1]:.1f} tokens/s"
    assert out.startswith(f"{text}\n\n{told}\n")
    for name in ("f16", "q8_0", "q4_0", "xquant"):
        assert f"\n{name} " in out


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_generate_tells_sizes_for_every_type(smollm2: str, kv_type: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", smollm2, "--kv-type", kv_type, "--max-tokens", "2", "--n-ctx", "512"]) == 0
    out = capfd.readouterr().out
    assert all(f"\n{name} " in out for name in ("f16", "q8_0", "q4_0", "xquant"))


def test_generate_follows_a_plan(smollm2: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"preset": "xquant-tiny", "window": 256}')
    assert main(["generate", smollm2, "--kv-plan", str(plan), "--max-tokens", "2", "--n-ctx", "512"]) == 0
    assert "\nxquant-tiny " in capfd.readouterr().out


def test_generate_cuts_a_prompt_that_is_too_long(
    smollm2: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], prose: str
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(prose)
    assert main(["generate", smollm2, "--prompt-file", str(prompt), "--max-tokens", "3", "--n-ctx", "512"]) == 0
    assert "prompt cut to 509 tokens" in capfd.readouterr().err


def test_inspect(smollm2: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", smollm2, "--n-ctx", "32768", "--kv-type", "xquant-paper", "--json"]) == 0
    out = json.loads(capfd.readouterr().out)
    # 30 layers: K 2 bits in 28 of them, V 2 bits in 2, the odd layers from 15 on borrow V codes
    assert out["k_bits"] == [2] * 28 + [1] * 2
    assert out["v_bits"] == [2] * 2 + [1] * 28
    assert out["equivalent_bits"] == pytest.approx((28 * 2 + 2 + 2 * 2 + 28 - 8) / 60)
    assert out["true_bits"] == pytest.approx(out["equivalent_bits"] + 1)
    assert out["kv_bytes"]["f16"] == 2 * 32768 * 30 * 3 * 128
    # 255 blocks, since the first page has none, of 30 layers and 3 heads: K codes 4096, V 2048, scales 256 each; a slot
    # of F16, and two pages in bytes
    in_bytes = 128 * 128 + 4 * (64 + 128)
    assert main(["inspect", smollm2, "--n-ctx", "32768", "--json"]) == 0
    xquant = json.loads(capfd.readouterr().out)["kv_bytes"]["xquant"]
    # and the page tables, 330 bytes a layer (counters that nodes keep), and what keys are rotated by
    assert 0 <= xquant - 90 * (255 * 6656 + 128 * 256 + 2 * in_bytes) < 8192 + 30 * 330 + 4 * 64**2
    assert main(["inspect", smollm2, "--n-ctx", "32768"]) == 0
    assert "3.250 true bits, 3.000 equivalent bits" in capfd.readouterr().out


def test_evaluate(smollm2: str, tmp_path: Path, prose: str, capfd: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text(prose)
    arguments = ["--tokens", "1024", "--n-ctx", "1024", "--n-ubatch", "128", "--skip", "500", "--json", str(out)]
    command = ["evaluate", smollm2, "--text", str(text), "--kv-types", "f16,q4_0,xquant,xquant-tiny", *arguments]
    # the figures below were measured with these; other kernels round otherwise
    with codec.force_kernels("avx2") if "avx2" in codec.kernel_sets() else nullcontext():
        assert main(command) == 0
    printed = capfd.readouterr().out
    assert "xquant-tiny" in printed
    # position 1023 has no next token
    ranges = r"^KLD, top-1 % +500 to 511 +512 to 1022\nf16 +0.0000 100.0 +0.0000 100.0$"
    assert re.search(ranges, printed, re.MULTILINE)
    results = {r["kv_type"]: r for r in json.loads(out.read_text())["results"]}
    names = {"kv_type", "ppl", "kld", "kld_p99", "kld_p999", "top1", "true_bits", "equivalent_bits", "kv_bytes"}
    assert all(set(r) >= names for r in results.values())
    assert (results["f16"]["kld"], results["f16"]["top1"]) == (pytest.approx(0, abs=1e-9), 1)
    for name, kld, top1, ppl in (
        ("q4_0", 0.037, 0.89, 37.1), ("xquant", 0.0053, 0.94, 36.2), ("xquant-tiny", 0.0146, 0.91, 36.1),
    ):  # fmt: skip
        told = results[name]
        assert told["kld"] == pytest.approx(kld, rel=0.5)
        assert told["top1"] == pytest.approx(top1, abs=0.03)
        assert told["ppl"] == pytest.approx(ppl, rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "no-such-model.gguf"], "no-such-model.gguf"),
        (["inspect", "MODEL", "--kv-type", "nope"], "kv_type is 'nope', must be one of"),
        (["inspect", "MODEL", "--kv-type", "q8_0"], "kv_type is 'q8_0', must be one of xquant"),
        (["inspect", "no-such-model.gguf"], "no-such-model.gguf"),
        (["generate", "MODEL", "--prompt", ""], "the prompt is empty"),
        (["generate", "MODEL", "--n-ctx", "512", "--max-tokens", "512"], "--max-tokens is 512, must be less than"),
        (["evaluate", "MODEL", "--text", "no-such-text"], "no-such-text"),
    ],
)
def test_errors_are_one_line(
    smollm2: str, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([smollm2 if a == "MODEL" else a for a in arguments]) == 1
    err = capfd.readouterr().err.strip().splitlines()
    assert err[-1].startswith("xquant-gguf: ")
    assert message in err[-1]


@pytest.mark.parametrize("option", ["--n-ctx=-1", "--max-tokens=0", "--threads=0", "--n-ctx=x", "--n-ctx=99999999999"])
def test_numbers_out_of_range_are_named(option: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "model.gguf", option])
    name, value = option.split("=")
    assert re.search(f"argument {name}: is '{value}', must be an integer of at least [01]", capfd.readouterr().err)


def test_a_text_that_is_too_short(smollm2: str) -> None:
    with pytest.raises(ValueError, match="4096 were asked for"):
        evaluate(smollm2, "short", ["xquant"], n_tokens=4096, progress=False)
    for sizes in ({"n_ctx": 512, "n_tokens": 900}, {"n_ctx": 2048, "n_tokens": 513}):
        told = f"n_tokens is {sizes['n_tokens']} and n_ctx {sizes['n_ctx']}: both must be above skip . 1, 513"
        with pytest.raises(ValueError, match=told):
            evaluate(smollm2, "a word " * 900, ["xquant"], skip=512, progress=False, **sizes)
