"""bench: rows for every type and depth; random models of given shapes; bad arguments are named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from support.clock import Clock, seconds
from xquant_gguf import Llama, fork, synthetic
from xquant_gguf.bench import UNTIMED, Runner, bench, weight_bytes
from xquant_gguf.cli import main

TINY = synthetic.Shape(n_layer=3, n_embd=128, n_ff=64, n_head=4, n_head_kv=2, head_dim=64, n_vocab=300)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(synthetic.SHAPES, "tiny", TINY)
    return synthetic.write(tmp_path / "tiny.gguf", "tiny", 2)


def test_random_models_have_the_shape(model: Path) -> None:
    llm = Llama(str(model), kv_type="f16", n_ctx=256, verbose=False)
    found = {
        key: llm.metadata[f"llama.{key}"] for key in ("block_count", "embedding_length", "attention.head_count_kv")
    }
    assert found == {"block_count": "2", "embedding_length": "128", "attention.head_count_kv": "2"}
    assert llm.n_vocab() == 300
    llm.close()


def test_rows(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    out = tmp_path / "out.json"
    options = ["--depths", "1200,0", "--kv-types", "f16,xquant", "--rounds", "1", "--n-prompt", "8", "--n-decode", "2"]
    assert main(["bench", str(model), *options, "--threads", "1", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["results"]
    assert [(r["depth"], r["kv_type"]) for r in rows] == [(0, "f16"), (0, "xquant"), (1200, "f16"), (1200, "xquant")]
    prompt, step = 8 / seconds(8), 1 / seconds(1)
    assert [(r["prompt_tps"], r["decode_tps"]) for r in rows] == [pytest.approx((prompt, step))] * 4
    assert rows[1]["kv_bytes"] < rows[0]["kv_bytes"]
    *table, kernels = capsys.readouterr().out.splitlines()
    assert len(table) == 5
    assert kernels == f"kernels {Llama.kernels()}, llama.cpp's {fork.cpu_variant()}"


def test_the_cache_is_as_before(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed at a depth is that depth's: what is timed is cut off again."""
    clock, steps = Clock(monkeypatch), list[str]()
    rows = bench(str(model), ["xquant"], [300, 40], rounds=2, n_prompt=8, n_decode=2, done=steps.append, n_threads=1)
    assert [r.depth for r in rows] == [40, 300]
    assert steps == ["fill", "warm up", "measure", "measure"] * 2

    def timed(depth: int) -> list[tuple[int, int]]:
        return [(depth, 8), *((depth + 8 + i, 1) for i in range(UNTIMED + 2))] * 3

    assert clock.batches == [(0, 40), *timed(40), (40, 260), *timed(300)]


def test_sequences_count_together(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sequences: a prompt is a batch of its own for each, a step is one batch for all."""
    Clock(monkeypatch)
    (row,) = bench(str(model), ["f16"], [16], rounds=1, n_prompt=8, n_decode=2, parallel=3, n_threads=1)
    assert (row.prompt_tps, row.decode_tps) == pytest.approx((8 / seconds(8), 3 / seconds(3)))


def test_sequences_share_the_cache_of_each_type(model: Path) -> None:
    types = ["xquant", "xquant-tiny", "f16"]
    numbers: dict[str, Any] = {"rounds": 1, "n_prompt": 8, "n_decode": 2, "n_threads": 1}
    sizes = [[row.kv_bytes for row in bench(str(model), types, [600], parallel=n, **numbers)] for n in (1, 3)]
    for one, three in zip(*sizes, strict=True):
        assert 2.5 * one < three < 3.5 * one
    assert sizes[1][1] < 0.9 * sizes[1][0] < 0.9 * sizes[1][2]


def test_as_many_sequences_as_fit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and caches take the memory up, but for less than one more sequence."""
    memory = 4 << 20
    numbers: dict[str, Any] = {"rounds": 1, "n_prompt": 8, "n_decode": 2, "n_threads": 1}
    rows = bench(str(model), ["f16", "xquant"], [300], memory=memory, **numbers)
    sizes = {row.parallel: row.kv_bytes for row in rows}
    assert len(sizes) == 2
    assert rows[1].parallel > rows[0].parallel > 1
    for row in rows:
        taken = weight_bytes(str(model)) + row.kv_bytes
        assert taken <= memory < taken + row.kv_bytes / row.parallel * 1.3  # a sequence's own share is not the mean
    with pytest.raises(ValueError, match=r"memory is 999 bytes, must be at least \d+: weights and one seq.* f16"):
        bench(str(model), ["f16"], [300], memory=999, **numbers)
    with pytest.raises(ValueError, match="parallel is 2, and memory says"):
        bench(str(model), ["f16"], [300], memory=memory, parallel=2, **numbers)


def test_sequences_are_copies(model: Path) -> None:
    """What a sequence is filled with is what the first one was."""
    runner = Runner(str(model), "xquant", 512, 3, n_threads=1)
    runner.fill(200)
    runner.fill(390)
    first, *others = (runner._session.answer([5], 390, [s])[0].copy() for s in range(3))
    assert all((other == first).all() for other in others)
    runner.close()


def test_steps_of_several_tokens(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As speculative decoding has them."""
    clock = Clock(monkeypatch)
    (row,) = bench(str(model), ["xquant"], [40], rounds=1, n_prompt=8, n_decode=2, step=5, parallel=2, n_threads=1)
    assert (row.decode_tps, row.step_s) == pytest.approx((10 / seconds(10), seconds(10)))
    assert clock.batches[-1] == (40 + 8 + (UNTIMED + 1) * 5, 10)


@pytest.mark.parametrize("weights", synthetic.WEIGHTS)
def test_weights_of_any_type_keep_the_size_of_what_they_multiply(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tensor's values have a standard deviation of one over the root of its width."""
    shape = synthetic.Shape(n_layer=1, n_embd=256, n_ff=512, n_head=4, n_head_kv=2, head_dim=64, n_vocab=300)
    monkeypatch.setitem(synthetic.SHAPES, "blocks", shape)
    path = synthetic.write(tmp_path / "blocks.gguf", "blocks", 1, weights)
    for tensor in GGUFReader(path).tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if "norm" in tensor.name:
            assert (values == 1).all()
        else:
            assert tensor.tensor_type == synthetic.WEIGHTS[weights]
            assert values.std() * values.shape[-1] ** 0.5 == pytest.approx(1, abs=0.1)
            assert abs(values.mean()) < 0.1 * values.std()
    llm = Llama(str(path), kv_type="xquant", n_ctx=256, verbose=False)
    llm.eval([5] * 20)
    llm.close()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bench"], "name a model, or --shape"),
        (["bench", "x.gguf", "--shape", "llama-8b"], "but not both"),
        (["bench", "x.gguf", "--layers", "2"], "--layers is 2"),
        (["bench", "x.gguf", "--weights", "q4_k"], "--weights is q4_k"),
        (["bench", "x.gguf", "--depths", "-4"], "'-4', must be an integer of at least 0"),
        (["bench", "nowhere.gguf"], r"nowhere\.gguf"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:

    assert main(argv) == 1
    assert re.search(message, capsys.readouterr().err)


def test_bad_shapes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shape is 'llama-9b', must be one of llama-8b"):
        synthetic.write(tmp_path / "m.gguf", "llama-9b")
    with pytest.raises(ValueError, match="layers is -1"):
        synthetic.write(tmp_path / "m.gguf", "llama-8b", -1)
    with pytest.raises(ValueError, match="weights is 'q2_k', must be one of f16, q8_0, q4_k"):
        synthetic.write(tmp_path / "m.gguf", "llama-8b", 1, "q2_k")
