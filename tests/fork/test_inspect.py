"""Sizes of caches that are told without loading weights, against those of caches that are really made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support import tiny_gguf
from support.contexts import Context
from xquant_gguf import Llama, fork
from xquant_gguf.inspect import inspect_cache
from xquant_gguf.session import Model


def write(path: Path, shape: tiny_gguf.Shape) -> str:
    return str(tiny_gguf.write(path, shape, tiny_gguf.random_weights(shape)))


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose last layer is a sliding one."""
    return write(tmp_path_factory.mktemp("sizes") / "sliding.gguf", tiny_gguf.Shape(arch="mimo2", n_layer=3))


def allocated(path: str, kv_type: str, **options: Any) -> int:
    llm = Llama(path, kv_type=kv_type, verbose=False, **options)
    size = llm.kv_cache_info()["bytes_allocated"]
    llm.close()
    return int(size)


@pytest.mark.parametrize("swa_full", [None, False])
@pytest.mark.parametrize(("n_ctx", "n_ubatch"), [(4096, 512), (4096, 128), (512, 512)])
def test_sizes_are_those_of_real_caches(sliding: str, n_ctx: int, n_ubatch: int, swa_full: bool | None) -> None:
    found = inspect_cache(sliding, "xquant-small", None, n_ctx=n_ctx, n_ubatch=n_ubatch, swa_full=swa_full)
    options: dict[str, Any] = {"n_ctx": n_ctx, "n_ubatch": n_ubatch, "n_batch": n_ubatch, "swa_full": swa_full}
    assert list(found.sizes) == list(found.compute) == ["f16", "q8_0", "q4_0", "xquant-small"]
    for kv_type, size in found.sizes.items():
        llm = Llama(sliding, kv_type=kv_type, flash_attn=True, verbose=False, **options)
        assert size == llm.kv_cache_info()["bytes_allocated"]
        assert found.compute[kv_type] == fork.compute_bytes(llm.ctx) > 0
        llm.close()
    assert found.info["bytes_other"] > 0
    assert found.info["layers"] == [0, 1]
    assert found.n_ctx == n_ctx


@pytest.mark.parametrize("n_seq", [1, 2, 4])
def test_sizes_of_several_sequences_are_those_of_caches_that_have_them(sliding: str, n_seq: int) -> None:
    sizes = inspect_cache(sliding, "xquant", None, n_ctx=8192, n_ubatch=128, n_seq=n_seq).sizes
    with Context(Path(sliding), "xquant", n_ctx=8192, n_ubatch=128, n_seq=8) as context:
        other = context.info()["bytes_other"]  # sliding layers, which have room for all from the start
        for sequence in range(n_seq):
            context.decode([5, 6, 7], 0, [sequence])
        info = context.info()
        page_table = 4 * (info["n_slots"] + info["n_bytes"] - 3)  # four bytes for each slot beyond those of one
        with Context(Path(sliding), "xquant", n_ctx=8192, n_ubatch=128) as alone:
            other -= alone.info()["bytes_other"]
        assert sizes["xquant"] == info["bytes_allocated"] + info["bytes_other"] - other - page_table
        assert (info["n_slots"], info["n_bytes"]) == (n_seq, 2 * n_seq)


def test_a_type_that_does_not_fit_the_heads_has_no_size(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", tiny_gguf.Shape(key_length=48, value_length=48))
    sizes = inspect_cache(path, "xquant", None, n_ctx=4096).sizes
    assert sizes["q8_0"] is None
    assert sizes["f16"] == 2 * 4096 * 4 * 2 * 96
    assert sizes["xquant"] == allocated(path, "xquant", n_ctx=4096)


def test_no_tokens_means_those_of_the_training(sliding: str) -> None:
    assert inspect_cache(sliding, "xquant", None, n_ctx=0).n_ctx == tiny_gguf.Shape().n_ctx


def test_a_plan_is_told_by_model_layers(sliding: str) -> None:
    plan = {"window": 256, "layers": {"1": {"k": {"bits": 2}}}}
    info = inspect_cache(sliding, "xquant", plan, n_ctx=4096).info
    assert (info["k_bits"], info["window"]) == ([4, 2], 256)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"xquant.preset": "x" * 128}, "must be a bool, int, float or str of under 128 bytes"),
        ({"xquant.preset": None}, "xquant.preset is None, must be a bool"),
    ],
)
def test_bad_overrides_are_named(sliding: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model(sliding, weights=False, overrides=overrides)


def test_overrides_of_every_kind_reach_the_model(sliding: str) -> None:
    values = {"general.name": "x", "mimo2.context_length": 1024, "mimo2.rope.freq_base": 5000.0}
    overrides = {**values, "tokenizer.ggml.add_bos_token": False}
    with Model(sliding, weights=False, overrides=overrides) as model, model.session("f16", n_ctx=0) as session:
        assert session.n_ctx == 1024


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist: .*missing\.gguf"):
        Model(tmp_path / "missing.gguf")
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match=r"Failed to load model from file: .*bad\.gguf"):
        Model(path)
