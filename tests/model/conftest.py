"""What tests of models share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support import tiny_gguf
from xquant_gguf import Llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of a few narrow layers with random weights."""
    shape = tiny_gguf.Shape()
    path = tmp_path_factory.mktemp("tiny") / "model.gguf"
    return str(tiny_gguf.write(path, shape, tiny_gguf.random_weights(shape)))


@pytest.fixture
def f16(tiny: str, request: pytest.FixtureRequest) -> Iterator[Llama]:
    """It with an F16 cache, and the OPTIONS of the test's file."""
    llm = Llama(tiny, kv_type="f16", flash_attn=True, **request.module.OPTIONS)
    yield llm
    llm.close()
