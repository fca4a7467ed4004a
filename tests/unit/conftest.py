"""What lies here needs neither a model nor a network."""

from __future__ import annotations

import socket

import llama_cpp
import pytest


@pytest.fixture(autouse=True)
def neither_model_nor_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that asks for either fails: it belongs into tests/fork or tests/model."""

    def refuse(*_: object) -> None:
        pytest.fail("a test in tests/unit loads a model, or connects to something")

    for module in (llama_cpp, llama_cpp.llama_cpp):
        monkeypatch.setattr(module, "llama_model_load_from_file", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
