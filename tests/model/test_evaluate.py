"""What evaluate counts: its formulas on numbers, and which positions of which windows are scored."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from xquant_gguf import Llama
from xquant_gguf.cli import main
from xquant_gguf.divergence import Expected
from xquant_gguf.evaluate import Tally, evaluate


def test_tally_on_numbers() -> None:
    """Two positions, two tokens: (1/2, 1/2) against (1/4, 3/4), and (9/10, 1/10) against itself."""
    reference, other = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]])
    tally = Tally()
    tally.add(Expected(reference.astype(np.float32)), other.astype(np.float32), np.array([1, 0]), 511)
    result = tally.result()
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert result["kld"] == pytest.approx(first / 2, rel=1e-6)
    assert result["kld_max"] == pytest.approx(first, rel=1e-6)
    assert [result[name] for name in ("kld_p99", "kld_p999")] == pytest.approx([0.99 * first, 0.999 * first], rel=1e-6)
    assert result["ppl"] == pytest.approx(math.exp(-(math.log(0.75) + math.log(0.9)) / 2), rel=1e-6)
    assert result["top1"] == 0.5
    before, behind = result["by_position"]  # position 511 is the last of a range, 512 the first of the next
    assert (before["first"], before["last"], before["n"], before["top1"]) == (511, 511, 1, 0)
    assert before["kld"] == pytest.approx(first, rel=1e-6)
    assert (behind["first"], behind["last"], behind["n"], behind["top1"]) == (512, 512, 1, 1)
    assert behind["kld"] == pytest.approx(0, abs=1e-6)


def test_ranges_of_positions_add_up() -> None:
    """Two windows of 3,000 positions, from 300 on: ranges have the positions of both, their means are the whole's."""
    rng = np.random.default_rng(0)
    tally = Tally()
    for _ in range(2):
        for start in range(300, 3000, 100):
            reference, other = (rng.normal(size=(100, 4)).astype(np.float32) for _ in range(2))
            tally.add(Expected(reference), other, np.zeros(100, np.int64), start)
    result = tally.result()
    ranges = result["by_position"]
    assert [(r["first"], r["last"], r["n"]) for r in ranges] == [
        (300, 511, 2 * 212), (512, 1023, 2 * 512), (1024, 2047, 2 * 1024), (2048, 2999, 2 * 952),
    ]  # fmt: skip
    for name in ("kld", "top1"):
        assert sum(r[name] * r["n"] for r in ranges) / (2 * 2700) == pytest.approx(result[name])


def test_positions_that_are_scored(smollm2: str, prose: str) -> None:
    """Perplexity of two windows by hand: from position skip on, the last token of a window predicts nothing."""
    n_ctx, skip = 256, 200
    got = evaluate(
        smollm2, prose, ["f16"], n_tokens=2 * n_ctx, n_ctx=n_ctx, skip=skip, n_ubatch=96, n_threads=2, progress=False
    )
    llm = Llama(smollm2, kv_type="f16", flash_attn=True, n_ctx=n_ctx, logits_all=True, verbose=False, n_threads=2)
    tokens = llm.tokenize(prose.encode(), special=False)[: 2 * n_ctx]
    nll = []
    for window in (tokens[:n_ctx], tokens[n_ctx:]):
        llm.reset()
        llm.eval(window)
        for position in range(skip, n_ctx - 1):
            logits = llm.scores[position].astype(np.float64)
            nll.append(np.logaddexp.reduce(logits) - logits[window[position + 1]])
    llm.close()
    assert got["results"][0]["ppl"] == pytest.approx(math.exp(np.mean(nll)), rel=2e-3)
    assert got["results"][0]["kld"] == 0
    assert (got["tokens"], got["n_ctx"], got["skip"], got["n_ubatch"]) == (512, 256, 200, 96)


def test_one_range_is_not_printed(smollm2: str, prose: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of several, tests/model/test_cli.py has the table."""
    text = tmp_path / "text.txt"
    text.write_text(prose)
    options = ["--tokens", "64", "--n-ctx", "64", "--skip", "40", "--kv-types", "f16"]
    assert main(["evaluate", smollm2, "--text", str(text), *options]) == 0
    assert "KLD, top-1" not in capfd.readouterr().out
