"""The commands server and run: what reaches llama.cpp's programs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from xquant_gguf import native, programs
from xquant_gguf.cli import main

XQUANT = ["-ctk", "xquant", "-ctv", "xquant"]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Programs and arguments that would have been executed."""
    calls: list[list[str]] = []

    def execute(name: str, arguments: Sequence[str]) -> None:
        calls.append([name, *arguments])
        raise SystemExit(0)

    monkeypatch.setattr(programs, "execute", execute)
    return calls


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["m.gguf"], ["-m", "m.gguf", *XQUANT]),
        (["m.gguf", "-c", "4096", "--metrics"], ["-m", "m.gguf", "-c", "4096", "--metrics", *XQUANT]),
        (["--models-dir", "models", "-np", "4"], ["--models-dir", "models", "-np", "4", *XQUANT]),
        ([], XQUANT),
        (["m.gguf", "--kv-type", "q8_0"], ["-m", "m.gguf", "-ctk", "q8_0", "-ctv", "q8_0"]),
        (["m.gguf", "-c", "1", "--kv-type=xquant-small", "-v"],
         ["-m", "m.gguf", "-c", "1", "-v", *XQUANT, "--override-kv", "xquant.preset=str:xquant-small"]),
        (["m.gguf", "-ctk", "f16"], ["-m", "m.gguf", "-ctk", "f16"]),
        (["m.gguf", "--cache-type-v=q8_0"], ["-m", "m.gguf", "--cache-type-v=q8_0"]),
    ],
)  # fmt: skip
def test_server_adds_the_cache_and_leaves_the_rest(
    typed: list[str], expected: list[str], given: list[list[str]]
) -> None:
    with pytest.raises(SystemExit):
        main(["server", *typed])
    assert given == [["llama-server", *expected]]


def test_help_is_both(given: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["server", "--help"])
    assert "usage: xquant-gguf server MODEL" in capsys.readouterr().out
    assert given == [["llama-server", "--help", *XQUANT]]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["server", "m.gguf", "--kv-type", "xquant-large"], "--kv-type is 'xquant-large', must be one of xquant, "),
        (["server", "m.gguf", "--kv-type", "q8_0", "-ctv", "f16"], "-ctv is given beside --kv-type q8_0"),
        (["run"], "run: the program is missing, must be one of llama-server, "),
        (["run", "llama-quantize"], "run: the program is 'llama-quantize', must be one of llama-server, "),
    ],
)
def test_wrong_arguments_are_errors(
    typed: list[str], message: str, given: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(typed) == 1
    assert message in capsys.readouterr().err
    assert not given


def test_run_leaves_everything(given: list[list[str]]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "llama-bench", "-m", "m.gguf", "--help", "--", "-x"])
    assert given == [["llama-bench", "-m", "m.gguf", "--help", "--", "-x"]]


def test_a_package_without_programs_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "LIBRARY_DIR", tmp_path)
    assert main(["server", "m.gguf"]) == 1
    assert f"llama-server is not in {tmp_path}: this package was built without programs" in capsys.readouterr().err


def test_execute_becomes_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / programs.PROGRAMS["rpc-server"]
    program.touch()
    monkeypatch.setattr(native, "LIBRARY_DIR", tmp_path)
    became: list[tuple[Path, list[str]]] = []
    monkeypatch.setattr(os, "execv", lambda file, arguments: became.append((file, arguments)))
    programs.execute("rpc-server", ["-p", "50052"])
    assert became == [(program, ["rpc-server", "-p", "50052"])]


def test_on_windows_it_ends_as_the_program_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "llama-cli.exe"
    program.write_text('#!/bin/sh\necho "$@" > told\nexit 7\n')
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(native, "LIBRARY_DIR", tmp_path)
    monkeypatch.setattr(programs, "ON_WINDOWS", True)
    with pytest.raises(SystemExit) as ended:
        programs.execute("llama-cli", ["-m", "model.gguf"])
    assert ended.value.code == 7
    assert (tmp_path / "told").read_text() == "-m model.gguf\n"
