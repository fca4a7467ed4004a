"""The Python of README and docs runs, on a tiny model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.documents import document, documents

WORKERS = "docs/several-machines.md"  # names workers that are not there; test_workers.py has some
EXAMPLES = [
    (page.path, i)
    for page in documents()
    for i, block in enumerate(page.blocks())
    if block.language == "python" and page.path != WORKERS
]


def test_the_readme_has_an_example() -> None:
    assert "README.md" in [path for path, _ in EXAMPLES]


@pytest.mark.parametrize(("path", "number"), EXAMPLES)
def test_python_of_the_pages_runs(path: str, number: int, paths: dict[str, Path], tmp_path: Path) -> None:
    """In a process of its own, where model.gguf is a tiny model."""
    (tmp_path / "model.gguf").symlink_to(paths["plain"])
    program = document(path).blocks()[number].text
    out = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert out.returncode == 0, out.stderr
    if path == "README.md":
        assert " bits per value, " in out.stdout
        assert out.stdout.endswith(" pages in codes\n")
