"""How llama.cpp's tests of llama-server are run and compared, on tests that need no server."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

import server_tests

UTILS = """
import requests

class ServerProcess:
    model_hf_repo, model_hf_file, ctk, ctv, fa = "ggml-org/test-model-stories260K", None, None, None, "off"
    def start(self):
        assert self.offline and self.fa is None
    offline, api_key = False, None
    def make_request(self, method, path, headers=None):
        class Answer:
            body = {"xquant": {}}
        return Answer

class ServerPreset:
    @staticmethod
    def load_all():
        raise RuntimeError("fetches models")

def download_file(url):
    raise RuntimeError("fetches " + url)
"""
TESTS = """
from utils import *

HUB = "https://huggingface.co/ggml-org/test-model-stories260K/resolve/main"

def test_goes_on_behind_a_failed_assert():
    server = ServerProcess()
    server.start()
    assert 1 == 2
    for i in range(3):
        assert i != 1
    assert server.offline, "with a message"
    assert server.ctk is None

def test_needs_another_model():
    server = ServerProcess()
    server.model_hf_repo = "ggml-org/no-such-model-GGUF:Q8_0"
    server.start()

def test_needs_a_file():
    assert open(download_file(f"{HUB}/model-00001-of-00001.gguf")).read() == "a model"
    assert requests.get(f"{HUB}/model-00001-of-00001.gguf").content == b"a model"
    download_file(f"{HUB}/lora.gguf")

def test_mcp_proxy():
    raise RuntimeError("fetches a page")

def test_ends_otherwise():
    server = ServerProcess()
    server.start()
    raise KeyError(server.ctk)

def test_passes():
    ServerPreset.load_all()
    assert True
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, server_tests.Results]:
    tmp_path = tmp_path_factory.mktemp("tests")
    (tmp_path / "unit").mkdir()
    (tmp_path / "utils.py").write_text(UTILS)
    (tmp_path / "unit" / "test_it.py").write_text(TESTS)
    server_tests.soften(tmp_path)
    snapshot = tmp_path / "tmp" / "models--ggml-org--test-model-stories260K" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "model-00001-of-00001.gguf").write_text("a model")
    args = argparse.Namespace(server=tmp_path / "server", python=Path(sys.executable), out=tmp_path, tests=[])
    return {kv_type: server_tests.run(tmp_path, kv_type, args) for kv_type in ("f16", "xquant")}


def test_asserts_and_ends_are_compared(results: dict[str, server_tests.Results]) -> None:
    outcomes = {name.partition("::")[2]: result["outcome"] for name, result in results["f16"].items()}
    assert outcomes == {
        "test_goes_on_behind_a_failed_assert": "failed",
        "test_needs_another_model": "skipped",
        "test_needs_a_file": "skipped",
        "test_mcp_proxy": "skipped",
        "test_ends_otherwise": "failed",
        "test_passes": "passed",
    }
    left_out = [r["error"] for r in results["f16"].values() if r["outcome"] == "skipped"]
    assert left_out == [
        "needs ggml-org/no-such-model-GGUF:Q8_0",
        "needs lora.gguf of ggml-org/test-model-stories260K",
        "needs a network: llama-server fetches a page of example.com",
    ]
    asserts = results["xquant"]["unit/test_it.py::test_goes_on_behind_a_failed_assert"]["asserts"]
    assert list(asserts.values()) == [False, False, True, False]
    found = server_tests.differences(results)
    assert [line.partition(": ")[2] for line in found] == [
        "f16: KeyError: None, xquant: KeyError: 'xquant'",
        "line 13: assert server.ctk is None: f16: True, xquant: False",
    ]


def test_the_same_results_are_no_difference(results: dict[str, server_tests.Results]) -> None:
    assert server_tests.differences({"f16": results["f16"], "q8_0": results["f16"]}) == []
