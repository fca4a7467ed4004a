"""The fork's source tree, and the one file that says which release it is made from."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import insert
import llama_source
import pinned
import prepare_llama

ROOT = Path(__file__).resolve().parents[2]
CACHE, GRAPH = Path("src/llama-kv-cache.cpp"), Path("src/llama-graph.cpp")
TABLE = f"""\
INSERTIONS = [
    {{"name": "clear", "file": "{CACHE}", "in": "cache::clear", "at": "begin", "text": "xq->clear(@ggml_type@);"}},
]
FRONT_ENDS = [
    {{"name": "mask", "file": "{CACHE}", "in": "cache::mask", "before": "fill", "text": "xq->mask();"}},
]
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up llama.cpp folder, and tables for it."""
    folder, tables = tmp_path / "source", tmp_path / "tables"
    for path, text in {
        CACHE: "void cache::clear() {\n    all();\n}\n\nvoid cache::mask() {\n    fill();\n}\n",
        GRAPH: "void graph() {\n}\n",
        Path("scripts/ui-assets.cmake"): "# what llama-server is built with\n",
        Path("docs/build.md"): "How to build.\n",
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    tables.mkdir()
    (tables / "insertions.py").write_text(TABLE)
    (tables / "fixes.py").write_text("FIXES = []\n")
    monkeypatch.setattr(insert, "TABLES", tables)
    monkeypatch.setenv("XQUANT_LLAMA_CPP_SOURCE", str(folder))
    return folder


def run(out: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare_llama.py", str(out), *arguments])
    prepare_llama.main()


def test_every_insertion_is_applied_and_what_is_not_built_stays_behind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "out", monkeypatch)
    tree = tmp_path / "out" / "llama.cpp"
    number = llama_source.read_release().ggml_type
    assert f"{{\n    xq->clear({number});\n    all();" in (tree / CACHE).read_text()
    assert "{\n    xq->mask();\n    fill();" in (tree / CACHE).read_text()
    assert sorted(path.name for path in tree.iterdir()) == ["scripts", "src"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("fill();", "", "insertions.py, \"mask\": src/llama-kv-cache.cpp: 'fill' is not in cache::mask"),
        ("fill();", "fill(); fill();", "'fill' occurs 2 times in cache::mask (lines 6, 6), not 1"),
        ("mask", "cover", "there is no cache::mask; 'fill' is in cache::cover"),
    ],
)
def test_insertion_that_cannot_be_made_stops_the_build(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, message: str
) -> None:
    (source / CACHE).write_text((source / CACHE).read_text().replace(old, new))
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "out", monkeypatch)
    assert message in str(stopped.value)
    assert not (tmp_path / "out" / "stamp").exists()


def test_another_sdist_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = llama_source.read_release()
    archive = tmp_path / release.sdist
    archive.write_bytes(b"something else")
    monkeypatch.setenv("XQUANT_LLAMA_CPP_SOURCE", str(archive))
    with pytest.raises(SystemExit, match=f"must be {release.sha256}"):
        run(tmp_path / "out", monkeypatch)


def test_folder_without_llama_cpp_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XQUANT_LLAMA_CPP_SOURCE", str(tmp_path))
    with pytest.raises(SystemExit, match=r"holds no llama\.cpp source"):
        run(tmp_path / "out", monkeypatch)
    monkeypatch.setenv("XQUANT_LLAMA_CPP_SOURCE", str(tmp_path / "gone"))
    with pytest.raises(SystemExit, match="gone does not exist"):
        run(tmp_path / "out", monkeypatch)


def test_unchanged_files_keep_their_times(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    run(out, monkeypatch)
    kept, changed = out / "llama.cpp" / GRAPH, out / "llama.cpp" / CACHE
    before = kept.stat().st_mtime_ns
    (source / CACHE).write_text((source / CACHE).read_text() + "// more\n")
    run(out, monkeypatch)
    assert kept.stat().st_mtime_ns == before
    assert changed.read_text().endswith("// more\n")


# -- the version file


def test_another_version_file_is_followed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "version.json"
    llama_source.write_release(llama_source.Release("9.9.9", "", 99), file)
    assert llama_source.read_release(file) == llama_source.Release("9.9.9", "", 99)
    run(tmp_path / "out", monkeypatch, str(file))
    assert "xq->clear(99);" in (tmp_path / "out" / "llama.cpp" / CACHE).read_text()


def test_package_requires_the_pinned_version_exactly() -> None:
    settings = {"result": ["llama-cpp-python=={llama_cpp_python}", "numpy>=1.26"]}
    version = llama_source.read_release().version
    assert pinned.dynamic_metadata("dependencies", settings) == [f"llama-cpp-python=={version}", "numpy>=1.26"]
    with pytest.raises(RuntimeError, match="not version from"):
        pinned.dynamic_metadata("version", settings)
    assert '"llama-cpp-python=={llama_cpp_python}"' in (ROOT / "pyproject.toml").read_text()


def test_version_and_hash_stand_in_one_file() -> None:
    release = llama_source.read_release()
    assert json.loads(llama_source.VERSION_FILE.read_text()).keys() == {"llama_cpp_python", "sha256", "ggml_type"}
    files = [ROOT / name for name in ("README.md", "CMakeLists.txt", "Makefile", "pyproject.toml")]
    for folder in ("native", "tools", "xquant_gguf", "docs", ".ci"):
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file() and "lib" not in path.parts]
    for path in files:
        text = path.read_text(errors="replace")
        if path != llama_source.VERSION_FILE:
            assert release.version not in text, f"{path} names the version"
            assert release.sha256 not in text, f"{path} names the hash"
