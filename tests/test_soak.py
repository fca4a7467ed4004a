"""The long chat of benchmarks/soak.py, short and on a tiny model; and its figures of a context shift."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import shift
import soak
import tiny_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    shape = tiny_gguf.Shape()
    return str(tiny_gguf.write(tmp_path_factory.mktemp("soak") / "tiny.gguf", shape, tiny_gguf.random_weights(shape)))


def test_memory_and_quality_stay_flat(model: str, prose: str) -> None:
    turns = soak.soak(model, prose, kv_type="xquant", minutes=0, turns=60, n_ctx=1024, n_ubatch=64, n_threads=1)
    thirds = turns[15:35], turns[40:]
    first, last = ({name: float(np.mean([turn[name] for turn in part])) for name in turns[0]} for part in thirds)
    assert last["kept"] > 0.2 * last["prompt"]
    assert last["sealed"] > 1
    assert last["mib"] - first["mib"] < 4
    assert 0 < last["kld"] < 1.5 * first["kld"]


def test_shifts_are_compared(model: str, prose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one shift changes is small beside what the cache changes; eight add up (measured: 2.3 times)."""
    text, out = tmp_path / "text", tmp_path / "out.json"
    text.write_text(prose)
    options = ["--tokens", "700", "--scored", "20", "--kv-types", "xquant", "--threads", "1", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["shift.py", model, "--text", str(text), *options])
    assert shift.main() == 0
    kld = {(row["kv_type"], row["shifts"]): row["kld"] for row in json.loads(out.read_text())}
    assert kld["f16", 8] < 0.1 * kld["xquant", 0]
    assert kld["xquant", 1] < 1.5 * kld["xquant", 0]
    assert kld["xquant", 0] < kld["xquant", 8] < 3 * kld["xquant", 0]
