"""Write docs/llama-cpp-fixes.md, for users, from the table native/llama/fixes.py.

usage: list_fixes.py
"""

from __future__ import annotations

from pathlib import Path

import insert

PAGE = Path(__file__).resolve().parent.parent / "docs" / "llama-cpp-fixes.md"
INTRODUCTION = """\
# Faults of llama.cpp that the fork repairs

For every type of cache, also F16: where this build behaves otherwise than llama.cpp itself, and it is not the XQuant
cache, it is one of these. (Written by `make fixes` from `native/llama/fixes.py`.)
"""


def page(fixes: list[insert.Fix]) -> str:
    """The page's text."""
    parts = [INTRODUCTION]
    for fix in fixes:
        files = dict.fromkeys(f"`{insertion.file}`" for insertion in fix.insertions)
        parts.append(f"## {fix.name[0].upper()}{fix.name[1:]}\n\n{fix.fault}\n\nRepaired in {', '.join(files)}.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(insert.fixes()))
