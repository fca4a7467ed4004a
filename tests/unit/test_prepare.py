"""The fork's source tree: anchors must be there exactly once, the sdist must be the pinned one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import prepare_llama


def insertions() -> list[tuple[str, str, str, str]]:
    return [insertion for table in prepare_llama.TABLES for insertion in prepare_llama.load(table)]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up llama.cpp source folder that holds every anchor of the tables once."""
    folder = tmp_path / "source"
    for file, anchor, _, _ in insertions():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as out:
            out.write(f"// before\n{anchor}\n// after\n")
    monkeypatch.setenv("XQUANT_LLAMA_CPP_SOURCE", str(folder))
    return folder


def run(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare_llama.py", str(out)])
    prepare_llama.main()


def test_every_insertion_is_applied(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "out", monkeypatch)
    for file, _, text, _ in insertions():
        assert text in (tmp_path / "out" / "llama.cpp" / file).read_text()


@pytest.mark.parametrize(
    ("copies", "message"), [(0, "is missing from src/llama-kv-cache.cpp"), (2, "occurs 2 times in")]
)
def test_missing_or_ambiguous_anchor_stops_the_build(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: int, message: str
) -> None:
    path, anchor = source / "src" / "llama-kv-cache.cpp", "    const bool is_mla = hparams.is_mla();\n"
    path.write_text(path.read_text().replace(anchor, anchor * copies))
    with pytest.raises(SystemExit, match=message) as stopped:
        run(tmp_path / "out", monkeypatch)
    assert "is_mla = hparams.is_mla()" in str(stopped.value)
    assert not (tmp_path / "out" / "stamp").exists()


def test_another_sdist_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / prepare_llama.SDIST
    archive.write_bytes(b"something else")
    monkeypatch.setenv("XQUANT_LLAMA_CPP_SOURCE", str(archive))
    with pytest.raises(SystemExit, match=f"must be {prepare_llama.SHA256}"):
        run(tmp_path / "out", monkeypatch)


def test_unchanged_files_keep_their_times(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    run(out, monkeypatch)
    kept, changed = out / "llama.cpp/src/llama-graph.cpp", out / "llama.cpp/src/llama-kv-cache.cpp"
    before = kept.stat().st_mtime_ns
    path = source / "src" / "llama-kv-cache.cpp"
    path.write_text(path.read_text() + "// more\n")
    run(out, monkeypatch)
    assert kept.stat().st_mtime_ns == before
    assert changed.read_text().endswith("// more\n")
