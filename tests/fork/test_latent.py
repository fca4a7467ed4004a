"""Models whose attention is latent (MLA): one row a token, which is the key and whose first channels are the values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.contexts import Context
from support.keys_as_values import write_latent
from support.models import error
from xquant_gguf import Llama, fork
from xquant_gguf.calibrate import Budget, calibrate, unmeasured
from xquant_gguf.cli import main
from xquant_gguf.cli.strip import copy_model
from xquant_gguf.plan import Shape, block_bytes

TOKENS = np.random.default_rng(3).integers(10, 290, 1000).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latent(tmp_path_factory.mktemp("latent") / "latent.gguf")


def test_nothing_is_stored_for_values(model: Path) -> None:
    with Context(model, "xquant", n_ctx=4096) as ours, Context(model, "f16", n_ctx=4096) as f16:
        found = fork.plan(ours.ctx, "xquant")
        assert found
        plan, shapes, _ = found
        assert shapes == [Shape(96, 0, 1)] * 3
        assert not any(layer.k.rotate for layer in plan.layers)
        assert fork.shapes(f16.ctx)[0] == shapes
        assert fork.shapes(f16.ctx)[1] == 3 * 4096 * 96 * 2
        before = ours.info()
        ours.decode(TOKENS[:900], 0)
        assert ours.info()["bytes_allocated"] == before["bytes_allocated"] < 3 * 4096 * 96 * 2
        n_open, n_sealed, n_bytes = (ours.info()[f"pages_{kind}"] for kind in ("open", "sealed", "bytes"))
        assert n_sealed > 3
        assert (n_open, n_bytes) == (3, 2)
        sizes = n_sealed * block_bytes(plan.layers[0], shapes[0]) + 128 * 96 * 2 + 2 * (128 * 96 + 4 * 96)
        assert ours.info()["bytes_used"] == 3 * sizes


def test_more_bits_do_less_harm(model: Path) -> None:
    """On random weights that says only that nothing is mixed up: less than llama.cpp's own four bits."""
    types = ("q4_0", "xquant", "xquant-small", "xquant-tiny")
    with Context(model, "f16") as f16:
        want = f16.decode(TOKENS[:900], 0)[-100:]
    harm = {}
    for kv_type in types:
        with Context(model, kv_type) as ours:
            harm[kv_type] = error(ours.decode(TOKENS[:900], 0)[-100:], want)
    assert harm["xquant"] < harm["q4_0"] / 2
    assert harm["xquant"] < harm["xquant-small"] < harm["xquant-tiny"] < 0.2


def test_a_sequence_of_mixed_pages_is_saved_and_loaded(model: Path) -> None:
    """Pages that sequences share are decoded into rows where only one of them is loaded."""
    with Context(model, "xquant", n_seq=3) as saved, Context(model, "xquant", n_seq=3) as live:
        rows = [(token, i // 2, (i % 2,)) for i, token in enumerate(TOKENS[:800])]
        saved.decode_mixed(rows)
        assert sum(not page.is_open for page in saved.pages().values()) >= 2
        live.decode(TOKENS[500:700], 0, [2])
        assert live.load(saved.save(1), 1)
        got, want = (context.decode(TOKENS[800:840], 400, [1]) for context in (live, saved))
        assert error(got, want) < 1e-4
        got, alone = live.decode(TOKENS[840:860], 200, [2]), None
        with Context(model, "xquant", n_seq=3) as fresh:
            fresh.decode(TOKENS[500:700], 0, [2])
            alone = fresh.decode(TOKENS[840:860], 200, [2])
        assert error(got, alone) < 1e-4


def test_calibration_chooses_bits_of_keys(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = calibrate(str(model), Budget(3.0), progress=False)
    assert result.sensitivity["v"] == [0.0] * 3
    assert all(x > 0 for x in result.sensitivity["k"])
    assert 2.0 < result.plan.true_bits(result.shapes) <= 3.0
    with_plan = tmp_path / "calibrated.gguf"
    copy_model(str(model), str(with_plan), result.keys())
    llm = Llama(str(with_plan), kv_type="xquant", n_ctx=1024, verbose=False)
    info: dict[str, Any] = llm.kv_cache_info()
    assert info["k_bits"] == [layer.k.bits for layer in result.plan.layers]
    assert info["v_bits"] == [None] * 3
    assert llm.create_completion(TOKENS[:600], max_tokens=4)["usage"]["completion_tokens"] > 0
    llm.close()
    assert unmeasured(str(model), Budget(2.5, equivalent=True)).plan.equivalent_bits(result.shapes) <= 2.5
    assert main(["inspect", str(with_plan), "--n-ctx", "4096"]) == 0
    assert "part of K" in capsys.readouterr().out
