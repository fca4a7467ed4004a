"""What Llama does with unusual arguments and at unusual moments, on tiny models: as with F16, or one clear error."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from support import tiny_gguf
from xquant_gguf import Llama
from xquant_gguf.cli import main

BOTH = pytest.mark.parametrize("kv_type", ["f16", "xquant"])


@pytest.fixture(scope="module")
def path(paths: dict[str, Path]) -> str:
    return str(paths["plain"])


@BOTH
@pytest.mark.parametrize("plan", [None, {"window": 256}, {"layers": {"0": {"k": {"bits": 2}}}}])
def test_a_vocabulary_alone(path: str, kv_type: str, plan: dict[str, Any] | None) -> None:
    """As one loads it to count tokens."""
    kv_plan = plan if kv_type == "xquant" else None
    llm = Llama(path, kv_type=kv_type, kv_plan=kv_plan, vocab_only=True, verbose=False)
    assert llm.detokenize(llm.tokenize(b"hello")) == b"hello"
    info = llm.kv_cache_info()
    assert (info["preset"], info["layers"], info["bytes_allocated"], info["bytes_used"]) == (kv_type, [], 0, 0)
    llm.close()


@BOTH
def test_contexts_of_any_length(path: str, kv_type: str) -> None:
    for n_ctx, expected in ((0, tiny_gguf.Shape().n_ctx), (1, 256), (700, 768)):
        llm = Llama(path, kv_type=kv_type, n_ctx=n_ctx, verbose=False)
        assert llm.n_ctx() == expected
        llm.close()


def test_a_context_that_memory_cannot_hold_says_so(path: str, tmp_path: Path) -> None:
    program = """
import resource, sys
from xquant_gguf import Llama
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
for kv_type in ("f16", "xquant"):
    try:
        Llama(sys.argv[1], kv_type=kv_type, n_ctx=1 << 23, verbose=False)
    except ValueError as error:
        print(error)
"""
    command = [sys.executable, "-c", program, path]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.splitlines()
    reasons = {"f16": ".*failed to allocate", "xquant": "its memory could not be allocated"}
    for (kv_type, reason), line in zip(reasons.items(), told, strict=True):
        assert re.match(rf"{path} with kv_type '{kv_type}': {reason}", line), line


def test_what_llama_cpp_refuses_is_told(path: str) -> None:
    """Heads of 64 are no multiple of 256, the block of a K quant."""
    with pytest.raises(ValueError, match=r"plain\.gguf with kv_type None: .*(block|quant|type)"):
        Llama(path, type_k=12, type_v=12, flash_attn=True, n_ctx=256, verbose=False)


@BOTH
def test_a_closed_model_says_so(path: str, kv_type: str) -> None:
    llm = Llama(path, kv_type=kv_type, n_ctx=512, verbose=False)
    state = llm.save_state()
    llm.close()
    llm.close()
    for use in (llm.kv_cache_info, lambda: llm.session, lambda: llm.load_state(state)):
        with pytest.raises(ValueError, match=r"plain\.gguf was closed"):
            use()


@BOTH
def test_an_error_leaves_the_model_usable(path: str, kv_type: str) -> None:
    llm = Llama(path, kv_type=kv_type, n_ctx=512, verbose=False)
    with pytest.raises(ValueError, match="exceed context window of 512"):
        llm("a" * 600)
    assert llm("a b c", max_tokens=4)["usage"]["prompt_tokens"] > 2
    llm.close()


def test_types_that_differ_are_told_apart(path: str) -> None:
    llm = Llama(path, type_k=8, type_v=1, flash_attn=True, n_ctx=512, verbose=False)
    info = llm.kv_cache_info()
    assert (info["preset"], info["k_bits"][0], info["v_bits"][0], info["true_bits"]) == ("q8_0, f16", 8.5, 16.0, 12.25)
    assert info["bytes_allocated"] == 512 * 4 * 2 * 64 * (8.5 + 16) / 8
    llm.close()


@pytest.fixture
def hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hugging Face hub that has one repository with one model."""
    hub, utils = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.utils")
    hub.HfFileSystem = lambda: SimpleNamespace(ls=lambda repo, recursive: [f"{repo}/plain.gguf"])  # type: ignore[attr-defined]
    hub.hf_hub_download = lambda **_: path  # type: ignore[attr-defined]
    utils.validate_repo_id = lambda repo: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", utils)


@pytest.mark.usefixtures("hub")
def test_models_from_the_hub_have_the_cache_that_was_asked_for() -> None:
    llm = Llama.from_pretrained("some/model", "*.gguf", kv_type="xquant-small", n_ctx=512, verbose=False)
    assert type(llm) is Llama
    assert llm.kv_cache_info()["preset"] == "xquant-small"
    llm.close()


@pytest.mark.usefixtures("hub")
def test_the_server_loads_models_from_the_hub() -> None:
    serve = pytest.importorskip("xquant_gguf.serve")
    settings = serve.Model(model="*.gguf", hf_model_repo_id="some/model", n_ctx=512, verbose=False)
    llm = serve.Proxy([settings])()
    assert llm.told["preset"] == "xquant"
    llm.close()


# ---- models in which there is nothing to quantize ----


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> str:
    """All of its layers, one, slide."""
    shape = tiny_gguf.Shape(arch="mimo2", n_layer=1)
    path = tmp_path_factory.mktemp("slides") / "slides.gguf"
    return str(tiny_gguf.write(path, shape, tiny_gguf.random_weights(shape)))


@pytest.mark.parametrize("options", [{"kv_type": "xquant"}, {"kv_type": "xquant-tiny"}, {"kv_plan": {"window": 256}}])
@pytest.mark.parametrize("swa_full", [None, False])
def test_a_model_whose_layers_all_slide(sliding: str, options: dict[str, Any], swa_full: bool | None) -> None:
    size: dict[str, Any] = {"n_ctx": 2048, "n_ubatch": 128, "n_batch": 128, "swa_full": swa_full}
    size |= {"n_threads": 1, "n_threads_batch": 1, "verbose": False}
    with pytest.warns(UserWarning, match="quantizes nothing: all layers of this model slide, and sliding layers stay"):
        llm = Llama(sliding, **options, **size)
    plain = Llama(sliding, kv_type="f16", flash_attn=True, **size)
    tokens = [3 + i % 200 for i in range(700)]
    for one in (llm, plain):
        one.eval(tokens)
    info, expected = llm.kv_cache_info(), plain.kv_cache_info()
    assert (info["layers"], info["true_bits"], info["equivalent_bits"]) == ([], 16.0, 16.0)
    assert 0 <= info["bytes_allocated"] - expected["bytes_allocated"] < 4096  # page tables
    assert llm.sample(temp=0) == plain.sample(temp=0)
    llm.load_state(llm.save_state())
    for one in (llm, plain):
        one.close()


def test_nothing_to_quantize_is_told_by_commands(sliding: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", sliding, "--n-ctx", "4096"]) == 0
    told = capfd.readouterr()
    assert "xquant quantizes nothing: all layers of this model slide" in told.err
    assert "xquant " in told.out
    for options in ([], ["--data-free"], ["--preset", "xquant"]):
        assert main(["calibrate", sliding, "--metadata-only", "plan.json", *options]) == 1
        assert "all layers slide, and sliding layers stay F16: there is nothing to choose" in capfd.readouterr().err
    with pytest.raises(ValueError, match="kv_plan: layers '0' cannot be: the model's cache has no layers"):
        Llama(sliding, kv_plan={"layers": {"0": {"k": {"bits": 2}}}}, n_ctx=512, verbose=False)


@pytest.mark.parametrize("folder", ["/nonexistent", "t" * 200])
def test_a_plan_needs_no_folder_for_temporary_files(path: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is handed over in memory: however long a folder's name is, or if there is none."""
    monkeypatch.setattr(tempfile, "tempdir", folder)
    llm = Llama(path, kv_plan={"preset": "xquant-small", "window": 256}, n_ctx=512, verbose=False)
    assert (llm.kv_cache_info()["window"], llm.kv_cache_info()["k_bits"][0]) == (256, 3)
    llm.close()
