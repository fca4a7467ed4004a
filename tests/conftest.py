"""Models for the tests: SmolLM2-135M-Instruct from PyPI, and tiny random ones."""

from __future__ import annotations

import os
from pathlib import Path

# before numpy is imported: its threads and those of llama.cpp would wait for each other on a small machine
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# before libgomp is loaded: threads that spin at each barrier take the processor from those that they wait for, where
# other processes run; two tests at a time on two cores took three times as long
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest

import downloads
import fetch_model
from support import cpu_variant, gpu, tiny_gguf
from support.alone import alone

cpu_variant.choose()


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Path of SmolLM2-135M-Instruct, fetched once into the user's cache folder."""
    with alone(downloads.folder()):
        return str(fetch_model.fetch())


@pytest.fixture(scope="session")
def prose() -> str:
    """A plain English text of a few thousand tokens, written for the tests; calibration does not see it."""
    return (Path(__file__).parent / "support" / "prose.txt").read_text()


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny models of tiny_gguf.MODELS as files."""
    folder = tmp_path_factory.mktemp("models")
    out = {}
    for name, shape in tiny_gguf.MODELS.items():
        weights = tiny_gguf.random_weights(shape)
        weights[f"blk.{shape.n_layer - 1}.attn_output.weight"] = weights["blk.0.attn_output.weight"]  # 0 if it slides
        out[name] = tiny_gguf.write(folder / f"{name}.gguf", shape, weights)
    return out


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what needs the real model: `-m "not smollm2"` runs without a network.

    Wheels come first: at the end two workers would share their tests, and each make an environment.
    """
    items.sort(key=lambda item: item.path.parent.name != "wheels")
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker("smollm2")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not gpu.available():
        pytest.skip("needs an NVIDIA GPU and a build with -DGGML_CUDA=ON")
