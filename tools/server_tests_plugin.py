"""Pytest plugin that tools/server_tests.py runs llama.cpp's server tests with: stand-in models, one type of cache.

XQUANT_TESTS holds its settings, as JSON: kv_type, report (a file for the results).  LLAMA_CACHE is the folder of
models.
"""

from __future__ import annotations

import importlib
import json
import linecache
import os
import sys
from collections.abc import Generator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

SETTINGS = json.loads(os.environ.get("XQUANT_TESTS", "{}"))
NETWORK = {
    "-IMG_URL_": "llama-server fetches a picture from a hub",
    "test_vision_chat_completion_token_count": "llama-server fetches a picture from a hub",
    "test_mcp_proxy": "llama-server fetches a page of example.com",
    "test_router_remote_preset": "llama-server fetches a list of models from a hub",
    "test_router_download_model": "llama-server fetches a model from a hub",
    "test_router_delete_model": "llama-server fetches a model from a hub",
}
"""Names of tests, or parts of their parameters, and what those tests want of a network."""

results: dict[str, dict[str, Any]] = {}
current: dict[str, Any] = {"asserts": {}}


def note(line: int, held: object) -> None:
    """Notes whether an assert held. One that runs several times held if it always did."""
    frame = sys._getframe(1)
    call = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    key = f"line {line}: assert {call.partition(', ')[2][:-1]}"
    current["asserts"][key] = bool(held) and current["asserts"].get(key, True)


def place_of(repository: str) -> Path:
    """Where a hub's repository lies."""
    return Path(os.environ["LLAMA_CACHE"]) / f"models--{repository.partition(':')[0].replace('/', '--')}"


def local_file(url: str, *_: Any) -> str:
    """The stand-in for a file of a hub."""
    repository, file = url.removeprefix("https://huggingface.co/").split("/resolve/main/")
    found = list(place_of(repository).glob(f"snapshots/*/{file}"))
    if not found:
        pytest.skip(f"needs {file} of {repository}")
    return str(found[0])


def use_local_models(utils: Any) -> None:
    """Makes the tests' servers load stand-ins, with the cache that is to be tested."""
    start, get = utils.ServerProcess.start, utils.requests.get

    def start_locally(self: Any, *args: Any, **more: Any) -> None:
        if self.model_hf_repo and not place_of(self.model_hf_repo).exists():
            pytest.skip(f"needs {self.model_hf_repo} {self.model_hf_file or ''}".rstrip())
        if SETTINGS["kv_type"] != "f16":
            self.ctk = self.ctv = SETTINGS["kv_type"]
        self.fa = None if self.fa == "off" else self.fa  # with XQuant flash attention must stay on
        self.offline = True
        start(self, *args, **more)
        if SETTINGS["kv_type"] == "xquant" and self.model_hf_repo:
            key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else None
            props = self.make_request("GET", "/props", headers=key)
            if "xquant" not in props.body:
                pytest.exit(f"llama-server has another cache than xquant: {props.body}")

    def get_locally(url: str, *args: Any, **more: Any) -> Any:
        if not url.startswith("https://huggingface.co/"):
            return get(url, *args, **more)
        return SimpleNamespace(content=Path(local_file(url)).read_bytes(), raise_for_status=lambda: None)

    utils.ServerProcess.start = start_locally
    utils.ServerPreset.load_all = staticmethod(lambda: None)
    utils.download_file = local_file
    utils.requests.get = get_locally


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name, _, parameters = item.name.partition("[")
        for part, what in NETWORK.items():
            if part == name or (part.startswith("-") and part in parameters):
                item.add_marker(pytest.mark.skip(f"needs a network: {what}"))


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Before the tests' own conftest imports what is changed here."""
    sys.path.insert(0, str(Path.cwd()))
    sys.modules.setdefault("wget", ModuleType("wget"))  # for downloads, which there are none of
    use_local_models(importlib.import_module("utils"))


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow"):
            error = "marked slow: needs models of a billion weights and more"
            results[item.nodeid] = {"outcome": "skipped", "error": error, "asserts": {}}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    global current
    current = results[item.nodeid] = {"outcome": "passed", "error": None, "asserts": {}}
    return (yield)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    result = results[report.nodeid]
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        result.update(outcome="skipped", error=reason.removeprefix("Skipped: "))
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        # without what the test was about to say: addresses, numbers of processes
        result.update(outcome="failed", error=(crash.message if crash else str(report.longrepr)).splitlines()[0][:120])
    elif report.when == "call" and not all(result["asserts"].values()):
        result["outcome"] = "failed"


def pytest_sessionfinish() -> None:
    Path(SETTINGS["report"]).write_text(json.dumps(results))
