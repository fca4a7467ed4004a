"""Tables and files that commands write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xquant_gguf.metadata import written_beside

if TYPE_CHECKING:
    from xquant_gguf.inspect import Inspected


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _mib(n_bytes: int | None) -> str:
    return f"{n_bytes / 2**20:.1f}" if n_bytes else "-"


def bytes_table(found: Inspected) -> str:
    """KV bytes by cache type, against F16, and those of its computing; a type that the model cannot have shows "-"."""
    f16 = found.sizes["f16"]
    rows = [["KV cache", f"MiB at {found.n_ctx}", "F16 / this", "to compute"]]
    for name, size in found.sizes.items():
        ratio = f"{f16 / size:.2f}" if size and f16 else "-"
        rows.append([name, _mib(size), ratio, _mib(found.compute[name])])
    return table(rows)


def write_json(path: str, value: Mapping[str, Any]) -> None:
    """Written beside and renamed."""
    with written_beside(Path(path)) as part:
        part.write_text(json.dumps(value, indent=1) + "\n")
