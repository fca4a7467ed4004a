"""What evaluate counts: its formulas on numbers, and which positions of which windows are scored."""

from __future__ import annotations

import math

import numpy as np
import pytest

from xquant_gguf import Llama
from xquant_gguf.divergence import Expected
from xquant_gguf.evaluate import Tally, evaluate


def test_tally_on_numbers() -> None:
    """Two positions, two tokens: (1/2, 1/2) against (1/4, 3/4), and (9/10, 1/10) against itself."""
    reference, other = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]])
    tally = Tally()
    tally.add(Expected(reference.astype(np.float32)), other.astype(np.float32), np.array([1, 0]))
    result = tally.result()
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert result["kld"] == pytest.approx(first / 2, rel=1e-6)
    assert result["kld_max"] == pytest.approx(first, rel=1e-6)
    assert [result[name] for name in ("kld_p99", "kld_p999")] == pytest.approx([0.99 * first, 0.999 * first], rel=1e-6)
    assert result["ppl"] == pytest.approx(math.exp(-(math.log(0.75) + math.log(0.9)) / 2), rel=1e-6)
    assert result["top1"] == 0.5


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
