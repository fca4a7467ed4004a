"""What tests of models share."""

from __future__ import annotations

import pytest

from support import tiny_gguf


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of a few narrow layers with random weights."""
    shape = tiny_gguf.Shape()
    path = tmp_path_factory.mktemp("tiny") / "model.gguf"
    return str(tiny_gguf.write(path, shape, tiny_gguf.random_weights(shape)))
