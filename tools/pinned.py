"""Requirements of the package that name the pinned llama-cpp-python: a metadata provider for scikit-build-core.

pyproject.toml lists them, with fields of native/llama/version.json in braces.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VERSION_FILE = Path(__file__).resolve().parent.parent / "native" / "llama" / "version.json"


def dynamic_metadata(field: str, settings: dict[str, Any]) -> list[str]:
    """The value of a field of [project]: setting `result`, filled in."""
    if field != "dependencies" or set(settings) != {"result"}:
        raise RuntimeError(f"pinned gives dependencies from a setting `result`, not {field} from {sorted(settings)}")
    pins = json.loads(VERSION_FILE.read_text())
    return [requirement.format(**pins) for requirement in settings["result"]]
