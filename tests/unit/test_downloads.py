"""Where downloads go: the user's cache, or, where that cannot be written, a folder for temporary files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

import downloads


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(folder))
    return folder


def test_the_users_cache(temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert downloads.folder() == tmp_path / "cache" / "xquant-gguf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert downloads.folder() == tmp_path / ".cache" / "xquant-gguf"
    assert not list(temporary.iterdir())


def test_a_home_that_cannot_be_written(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))  # nobody makes a folder in a file, not even root
    found = downloads.folder()
    assert found.parent == temporary
    assert found.stat().st_mode & 0o777 == 0o700
    assert f"{tmp_path}/file/.cache/xquant-gguf cannot be made" in capsys.readouterr().out
    temporary.joinpath(found.name).rmdir()
    temporary.rmdir()
    temporary.write_text("")
    with pytest.raises(SystemExit, match="there is no folder for downloads"):
        downloads.folder()
