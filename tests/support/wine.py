"""Programs for Windows here, under wine."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
VARIABLES = {"WINEPREFIX": str(ROOT / "build" / "wine"), "WINEDEBUG": "-all"}
"""Environment variables of wine: a Windows of our own, and silence."""


def wine(program: Path, *arguments: str | Path) -> list[str | Path]:
    """The command that runs a program for Windows."""
    (ROOT / "build").mkdir(exist_ok=True)
    return ["env", *(f"{name}={value}" for name, value in VARIABLES.items()), "wine", program, *arguments]
