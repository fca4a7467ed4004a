"""Calibration on tiny models: what it measures, the maps that it fits, the files that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from support import tiny_gguf
from xquant_gguf import codec
from xquant_gguf.calibrate import Budget, calibrate
from xquant_gguf.cli import main
from xquant_gguf.gguf_file import GGUFFile
from xquant_gguf.metadata import read_plan
from xquant_gguf.plan import PAGE
from xquant_gguf.sides import RIDGE, fit_map

SHAPE = tiny_gguf.Shape(n_ctx=4096)
DEAF = 2  # this layer's attention reaches nobody


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    weights = tiny_gguf.random_weights(SHAPE)
    weights[f"blk.{DEAF}.attn_output.weight"][:] = 0
    return str(tiny_gguf.write(tmp_path_factory.mktemp("calibrate") / "model.gguf", SHAPE, weights))


def test_calibrate_finds_the_layer_that_does_not_matter(model: str, prose: str) -> None:
    result = calibrate(model, Budget(2.5), text=prose, n_threads=1, progress=False)
    plan = result.plan
    assert 2.3 < plan.true_bits(result.shapes) <= 2.5
    for name in "kv":
        harm = result.sensitivity[name]
        assert harm[DEAF] <= 0.05 * max(harm)
        bits = [getattr(layer, name).bits for layer in plan.layers]
        assert bits[DEAF] == min(bits)
    assert set(plan.maps) == {i for i, layer in enumerate(plan.layers) if layer.v.source >= 0}
    small = calibrate(model, Budget(1.375, equivalent=True), text=prose, n_threads=1, progress=False).plan
    assert small.equivalent_bits() <= 1.375
    assert plan.expected_kld is not None
    assert small.expected_kld is not None
    assert 0 < plan.expected_kld < 0.5 * small.expected_kld  # measured: 1.5e-4 and 5.6e-4


def test_keys_whose_channels_have_sizes_of_their_own_get_matrices(prose: str, tmp_path: Path) -> None:
    """Keys made large in some channels, and queries small there: as before to the model, not to codes."""
    weights = tiny_gguf.random_weights(SHAPE)
    plain = str(tiny_gguf.write(tmp_path / "plain.gguf", SHAPE, weights))
    # RoPE turns two channels side by side together
    sizes = np.repeat(np.exp(1.5 * np.random.default_rng(1).standard_normal(SHAPE.key_length // 2)), 2)
    for i in range(SHAPE.n_layer):
        for name, n_head, by in (("q", SHAPE.n_head, 1 / sizes), ("k", SHAPE.n_head_kv, sizes)):
            weights[f"blk.{i}.attn_{name}.weight"] *= np.tile(by, n_head)[:, None].astype(np.float32)
    scaled = str(tiny_gguf.write(tmp_path / "scaled.gguf", SHAPE, weights))
    found = [
        calibrate(path, Budget(2.5), text=prose, n_threads=1, maps=False, progress=False).plan
        for path in (plain, scaled)
    ]
    assert set(found[1].transforms) == set(range(SHAPE.n_layer))
    assert not any(layer.k.rotate for layer in found[1].layers)
    plain_kld, scaled_kld = (plan.expected_kld or 0.0 for plan in found)
    assert 0 < scaled_kld < 1.3 * plain_kld


def test_maps_find_the_head_and_the_matrix() -> None:
    """Values that are a linear map of another layer's second head: predicted but for the source's own error."""
    rng = np.random.default_rng(0)
    source = rng.standard_normal((2, 6 * PAGE, 64)).astype(np.float16)
    matrix = rng.standard_normal((64, 64)) / 8
    rows = (source[1].astype(np.float64) @ matrix).astype(np.float16)[None]
    stored = np.stack([codec.hadamard(h.astype(np.float32)) for h in source])
    fit = fit_map(stored, rows)
    assert fit.value_map.heads == (1,)
    hadamard = codec.hadamard(np.eye(64, dtype=np.float32))
    weight = np.frombuffer(fit.value_map.weight, "<f2").reshape(64, 64)
    # columns of the source do not correlate: what ridge regression takes off is alike for all
    np.testing.assert_allclose(weight, hadamard @ matrix @ hadamard / (1 + RIDGE), atol=0.02)


def test_a_text_that_is_too_short(model: str) -> None:
    with pytest.raises(ValueError, match="the text has 5 tokens, must have at least 1280"):
        calibrate(model, Budget(3.0), text="short", progress=False)


def test_a_budget_that_is_too_small(model: str, prose: str) -> None:
    with pytest.raises(ValueError, match="the smallest cache costs"):
        calibrate(model, Budget(0.2), text=prose, n_threads=1, progress=False)


def test_commands(model: str, prose: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = ("text", "out.gguf", "plan.json", "all.json", "plain.gguf")
    text, out, plan, everything, plain = (tmp_path / name for name in names)
    text.write_text(prose)
    arguments = ["--bits", "2.75", "--text", str(text), "--threads", "1", "--metadata-only", str(plan)]
    arguments += ["--json", str(everything)]
    assert main(["calibrate", model, str(out), *arguments]) == 0
    printed = capfd.readouterr().out
    assert "expected KL divergence from F16: " in printed
    found, *_ = read_plan(out) or pytest.fail("no plan")
    assert json.loads(plan.read_text()) == json.loads(json.dumps(found.to_dict()))
    whole = json.loads(everything.read_text())
    assert whole["plan"] == json.loads(plan.read_text())
    assert whole["layers"] == list(range(SHAPE.n_layer))
    assert all(len(whole["sensitivity"][side]) == SHAPE.n_layer for side in "kv")
    assert whole["made_by"]["tokens"] >= 1280
    assert 2.5 < whole["true_bits"] <= 2.75
    assert main(["inspect", str(out), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["k_bits"] == [layer.k.bits for layer in found.layers]
    assert told["true_bits"] <= 2.75
    assert told["file"]["xquant.k.bits"] == told["k_bits"]
    assert told["file"]["xquant.calibration.tokens"] == whole["made_by"]["tokens"]
    assert main(["inspect", str(out)]) == 0
    assert f"xquant.k.bits = {' '.join(map(str, told['k_bits']))}" in capfd.readouterr().out
    assert main(["inspect", model, "--kv-plan", str(plan), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["k_bits"] == told["k_bits"]
    assert main(["strip", str(out), str(plain)]) == 0
    assert plain.read_bytes() == Path(model).read_bytes()
    for extra in (["--data-free"], ["--preset", "xquant-small"]):
        assert main(["calibrate", model, str(out), *extra]) == 0
        assert "xquant.version" in GGUFFile(out).keys
    assert main(["calibrate", model]) == 1
    assert "name an output file" in capfd.readouterr().err
    assert main(["calibrate", model, str(out), "--data-free", "--json", str(everything)]) == 1
    assert "--json holds what was measured" in capfd.readouterr().err
