"""What a release refuses."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import release


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository that may be released as 1.2.3."""
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "somebody")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "somebody@example.org")
    release.git("init", "-q", root=tmp_path)
    write(tmp_path, "1.2.3", "## 1.2.3, 2026-01-31\n\nThis.\n\n## 1.2.2, 2025-12-24\n")
    return tmp_path


def write(tree: Path, version: str, changes: str) -> None:
    (tree / "pyproject.toml").write_text(f'[project]\nversion = "{version}"\n')
    (tree / "CHANGELOG.md").write_text(f"# Changes\n\n{changes}")
    release.git("add", ".", root=tree)
    release.git("commit", "-q", "-m", "Release", root=tree)


def test_a_clean_tree_with_a_dated_version_is_released(tree: Path) -> None:
    assert release.check(tree) == "1.2.3"


def test_changes_are_refused(tree: Path) -> None:
    (tree / "new.py").write_text("")
    with pytest.raises(release.Refused, match=r"no commit has: \?\? new.py"):
        release.check(tree)


@pytest.mark.parametrize("heading", ["## 1.2.4, 2026-01-31", "## 1.2.3, not released yet", "## 1.2.3", ""])
def test_a_version_without_its_date_is_refused(tree: Path, heading: str) -> None:
    write(tree, "1.2.3", heading)
    with pytest.raises(release.Refused, match=r"must be '## 1\.2\.3, YYYY-MM-DD'"):
        release.check(tree)


@pytest.mark.parametrize("version", ["1.2", "1.2.3.dev0", "v1.2.3", ""])
def test_odd_versions_are_refused(tree: Path, version: str) -> None:
    write(tree, version, f"## {version}, 2026-01-31\n")
    with pytest.raises(release.Refused, match=r"pyproject\.toml"):
        release.check(tree)


def test_a_version_is_released_once(tree: Path) -> None:
    release.git("tag", "v1.2.3", root=tree)
    with pytest.raises(release.Refused, match=r"a tag v1\.2\.3 already"):
        release.check(tree)


def test_a_command_that_fails_ends_it(tree: Path) -> None:
    with pytest.raises(release.Refused, match="false failed"):
        release.run("false", folder=tree)
    with pytest.raises(subprocess.CalledProcessError):
        release.git("no-such-command", root=tree)
