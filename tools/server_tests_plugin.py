"""Pytest plugin that tools/server_tests.py runs llama.cpp's server tests with: local models, one type of cache.

XQUANT_TESTS holds its settings, as JSON: kv_type, model, infill (a model or null), report (a file for the results).
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Generator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SETTINGS = json.loads(os.environ.get("XQUANT_TESTS", "{}"))
GENERATES = ("stories260K", "stories15M_MOE", "tinyllama", "bert-bge-small")
"""Words of the names of hub models in whose place any model that generates text can stand, mostly."""

results: dict[str, dict[str, Any]] = {}
current: dict[str, Any] = {"asserts": {}}


def note(line: int, text: str, held: object) -> None:
    """Notes whether an assert held. One that runs several times held if it always did."""
    key = f"line {line}: assert {text}"
    current["asserts"][key] = bool(held) and current["asserts"].get(key, True)


def place_of(repository: str, file: str) -> str | None:
    """The local model in place of one from a hub."""
    if "infill" in repository:
        return SETTINGS["infill"]
    return SETTINGS["model"] if any(word in f"{repository}/{file}" for word in GENERATES) else None


def use_local_models(utils: Any) -> None:
    """Makes the tests' servers load local models, with the cache that is to be tested."""
    start = utils.ServerProcess.start

    def start_locally(self: Any, *args: Any, **more: Any) -> None:
        if self.model_hf_repo:
            model = place_of(self.model_hf_repo, self.model_hf_file or "")
            if model is None:
                pytest.skip(f"needs {self.model_hf_repo} {self.model_hf_file or ''}".rstrip())
            self.model_file, self.model_hf_repo, self.model_hf_file = model, None, None
            if SETTINGS["kv_type"] != "f16":
                self.ctk = self.ctv = SETTINGS["kv_type"]
            self.fa = None if self.fa == "off" else self.fa  # with XQuant flash attention must stay on
        self.offline = True
        start(self, *args, **more)
        if SETTINGS["kv_type"] == "xquant" and self.model_file:
            key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else None
            props = self.make_request("GET", "/props", headers=key)
            if "xquant" not in props.body:
                pytest.exit(f"llama-server has another cache than xquant: {props.body}")

    def local_file(url: str, *_: Any) -> str:
        if url.endswith("stories15M-q4_0.gguf"):  # a draft model: of the same vocabulary
            return str(SETTINGS["model"])
        pytest.skip(f"needs {url.rpartition('/')[2]}")

    utils.ServerProcess.start = start_locally
    utils.ServerPreset.load_all = staticmethod(lambda: None)
    utils.download_file = local_file


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Before the tests' own conftest imports what is changed here."""
    sys.path.insert(0, str(Path.cwd()))
    sys.modules.setdefault("wget", ModuleType("wget"))  # for downloads, which there are none of
    use_local_models(importlib.import_module("utils"))


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
