"""Prompts with images: llama_cpp's own image handler with a random tiny encoder, on every cache type."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp.llama_chat_format import Llava15ChatHandler
from matplotlib.image import imsave
from numpy.typing import NDArray

from support import tiny_gguf
from xquant_gguf import Llama

SHAPE = tiny_gguf.Shape()
N_IMAGE = 256  # embeddings of an image: two pages


def url(seed: int) -> str:
    """A picture of coloured blocks."""
    blocks = np.random.default_rng(seed).random((4, 4, 3)).repeat(16, 0).repeat(16, 1)
    png = io.BytesIO()
    imsave(png, blocks, format="png")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_gguf.write(folder / "plain.gguf", SHAPE, tiny_gguf.random_weights(SHAPE))
    tiny_gguf.write_projector(folder / "projector.gguf", SHAPE.n_embd)
    return folder


def asked(folder: Path, kv_type: str, image: int) -> tuple[NDArray[np.float32], int, int]:
    """Logits behind a long question about an image, tokens and embeddings in the cache, and pages sealed."""
    handler = Llava15ChatHandler(str(folder / "projector.gguf"), verbose=False)
    options: dict[str, Any] = {"n_ctx": 1024, "n_batch": 64, "n_ubatch": 64, "n_threads": 1, "logits_all": True}
    llm = Llama(str(folder / "plain.gguf"), kv_type=kv_type, chat_handler=handler, verbose=False, **options)
    content = [
        {"type": "image_url", "image_url": {"url": url(image)}},
        {"type": "text", "text": tiny_gguf.text(300, seed=3)},
    ]
    llm.create_chat_completion([{"role": "user", "content": content}], max_tokens=1, temperature=0)
    n, sealed = llm.n_tokens, llm.kv_cache_info().get("pages_sealed", 0)
    logits = np.array(llm.scores[n - 1])
    llm.close()
    return logits, n, sealed


@pytest.fixture(scope="module")
def in_f16(folder: Path) -> list[tuple[NDArray[np.float32], int, int]]:
    return [asked(folder, "f16", image) for image in (0, 1)]


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0", "xquant"])
def test_a_question_about_an_image(
    folder: Path, in_f16: list[tuple[NDArray[np.float32], int, int]], kv_type: str
) -> None:
    """As with an F16 cache, by the measure of what another image changes."""
    (want, n, _), (other, _, _) = in_f16
    got, n_ours, sealed = asked(folder, kv_type, 0)
    assert n_ours == n > N_IMAGE + 300
    assert kv_type != "xquant" or sealed > N_IMAGE // 128
    # measured: 0.01, 0.09, 0.29
    assert np.abs(got - want).mean() < 0.5 * np.abs(want - other).mean()
