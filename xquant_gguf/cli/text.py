"""Tables and files that commands write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xquant_gguf.metadata import written_beside


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def bytes_table(sizes: Mapping[str, int | None], n_ctx: int) -> str:
    """KV bytes at n_ctx by cache type, against F16; a type that the model cannot have shows "-"."""
    f16 = sizes["f16"]
    rows = [["KV cache", f"MiB at {n_ctx}", "F16 / this"]]
    for name, size in sizes.items():
        rows.append([name, f"{size / 2**20:.1f}" if size else "-", f"{f16 / size:.2f}" if size and f16 else "-"])
    return table(rows)


def write_json(path: str, value: Mapping[str, Any]) -> None:
    """Written beside and renamed."""
    with written_beside(Path(path)) as part:
        part.write_text(json.dumps(value, indent=1) + "\n")
