"""One model of each kind, as docs/models.md tells of all: `python -m support.models` runs them all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import models, upstream

ROOT = Path(__file__).resolve().parents[2]

RUN = {
    "llama-dense": "plain",
    "gemma3-dense": "sliding",
    "qwen35-dense": "hybrid",  # delta net
    "nemotron_h-dense": "hybrid",  # Mamba2, layers without either
    "falcon-h1-dense": "hybrid",  # both in one layer
    "lfm2-dense": "hybrid, sliding",  # convolution
    "deepseek2-moe": "MLA",
    "kimi-linear-moe": "hybrid, MLA",
}
REFUSED = {
    "deepseek32-moe": "its sparse attention has an indexer",
    "qwen4exp-moe": "its sparse attention has an indexer",
    "deepseek4-moe": "its sparse attention has an indexer",
    "mamba-dense": "it keeps a recurrent state",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = upstream.make_models(tmp_path_factory.mktemp("models"), [*RUN, *REFUSED])
    return {path.stem: path for path in paths}


@pytest.mark.parametrize("name", RUN)
def test_a_model_does_what_it_does_with_f16(made: dict[str, Path], name: str) -> None:
    row = models.examine(made[name])
    assert not row.refused
    assert not row.failed
    assert row.needed
    assert row.kind == RUN[name]
    assert 0 < row.open < models.OPEN
    if row.kind != "hybrid, sliding":  # a tiny one has no layer that sees all tokens
        assert 0 < row.sealed < models.SEALED < row.harm


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_is_refused_with_a_reason(made: dict[str, Path], name: str) -> None:
    row = models.examine(made[name])
    assert REFUSED[name] in row.refused
    assert not row.failed


def test_the_command_takes_the_installed_package() -> None:
    """In a checkout `python -m` finds one without libraries first, and what it starts must not."""
    program = "from support import models; print(models.ENVIRONMENT['PYTHONPATH'])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-c", program]
    out = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert not {"", str(ROOT)} & set(out.stdout.strip().split(os.pathsep))
