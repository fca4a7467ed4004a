"""Every architecture that llama.cpp's own generator writes a random model of, with an XQuant cache.

usage: PYTHONPATH=tests python -m support.models [--jobs 2] [--write docs/models.md] [NAME ...]

Each model runs with each type of cache in a process of its own (model_run.py), so that a crash is one failed row. Exit
status 1 if any failed: where a q8_0 cache runs, ours runs or gives a reason, and does what F16 does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from support import cpu_variant, upstream
from support.contexts import Logits
from support.model_run import LONG, SHORT, WHOLE, Length

# Mean squared error over the variance of the logits. A cache that never seals, beside F16 without flash attention, and
# a sealing one beside numpy's of the same keys and values.
OPEN, SEALED = 1e-5, 1e-6
TESTS = str(Path(__file__).resolve().parent.parent)
cpu_variant.choose()
# without the folder that `python -m` puts first: in a checkout that is the package, but not its libraries
PATHS = [TESTS, *(path for path in sys.path if path not in ("", os.getcwd()))]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS)}


@dataclass
class Run:
    """What model_run left."""

    status: int
    said: str
    told: dict[str, Any] = field(default_factory=dict)
    logits: dict[str, Logits] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return self.status == 0 and bool(self.told.get("done"))


def run(model: Path, kind: str, n_ubatch: int, length: Length = LONG) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "support.model_run", str(model), kind, str(n_ubatch), folder]
        command += ["short"] if length is SHORT else []
        try:
            out = subprocess.run(
                command, env=ENVIRONMENT, capture_output=True, text=True, errors="replace", timeout=300, check=False
            )
            status, said = out.returncode, out.stderr[-1000:]
        except subprocess.TimeoutExpired:
            status, said = -1, "took more than five minutes"
        told = Path(folder, "told.json")
        return Run(
            status, said,
            json.loads(told.read_text()) if told.exists() else {},
            {file.stem: np.load(file) for file in sorted(Path(folder).glob("*.npy"))},
        )  # fmt: skip


def error(got: Logits, want: Logits) -> float:
    return float(((got - want) ** 2).mean() / want.var())


@dataclass
class Row:
    """What became of a model: refused and failed are empty where all is well; errors are those of the worst step."""

    name: str
    kind: str = ""
    shapes: str = ""
    needed: bool = False  # a q8_0 cache runs
    refused: str = ""
    failed: list[str] = field(default_factory=list)
    open: float = 0.0  # a cache that never seals, beside F16
    harm: float = 0.0  # one that seals, beside F16
    sealed: float = 0.0  # one that seals, beside numpy's


def kind_of(told: dict[str, Any], refused: str) -> str:
    names = [name for name in ("recurrent", "hybrid", "sliding") if told.get(name)]
    latent = any(e == 0 for _, e in told.get("shapes", [])) or "MLA" in refused
    return ", ".join(names + (["MLA"] if latent else [])) or "plain"


def examine(model: Path) -> Row:
    row = Row(model.stem)
    length = LONG
    row.needed = "prompt" in run(model, "q8_0", 64).logits
    first = run(model, "open", 64)
    if not row.needed and first.status != 0:  # llama.cpp stops the process where learned positions end
        length = SHORT
        row.needed = "prompt" in run(model, "q8_0", 64, length).logits
        first = run(model, "open", 64, length)
    if refused := str(first.told.get("refused", "")):
        row.refused = refused.partition("cannot use it: ")[2].partition("; use ")[0] or refused
    row.kind = kind_of(first.told, row.refused)
    if row.refused:
        return row
    shapes = [tuple(pair) for pair in first.told.get("shapes", [])]
    row.shapes = ", ".join(f"{d}, latent" if e == 0 else str(d) if d == e else f"{d}/{e}" for d, e in shapes)
    for n_ubatch in (64, 512):
        f16 = run(model, "f16", n_ubatch, length)
        opened = first if n_ubatch == 64 else run(model, "open", n_ubatch, length)
        row.open = max(row.open, beside_f16(row, f"open, micro-batches of {n_ubatch}", opened, f16))
        sealing = run(model, "sealed", n_ubatch, length)
        row.harm = max(row.harm, beside_f16(row, f"sealed, micro-batches of {n_ubatch}", sealing, f16))
    sealing, specified = (run(model, kind, WHOLE, length) for kind in ("sealed", "specified"))
    row.sealed = beside_numpy(row, sealing, specified, length)
    if row.open > OPEN or row.sealed > SEALED:
        row.failed.append(f"{row.open:.1e} from F16, {row.sealed:.1e} from numpy")
    return row


def beside_f16(row: Row, what: str, ours: Run, f16: Run) -> float:
    """The worst step's error. Ours must go as far as F16, which llama.cpp itself ends at some models' shifts."""
    if f16.done and not ours.done:
        row.failed.append(f"{what}: {ours.said.strip()[-300:]}")
    elif missing := sorted(set(f16.logits) - set(ours.logits)):
        row.failed.append(f"{what}: F16 can, ours cannot: {', '.join(missing)}")
    return max((error(ours.logits[step], f16.logits[step]) for step in set(f16.logits) & set(ours.logits)), default=0)


def beside_numpy(row: Row, ours: Run, specified: Run, length: Length) -> float:
    for name, one in (("sealed", ours), ("specified", specified)):
        if not one.done:
            row.failed.append(f"{name}: {one.said.strip()[-300:]}")
    if row.failed:
        return 0.0
    if ours.told["shapes"] and ours.told["sealed"] != list(length.sealed):
        row.failed.append(f"pages {ours.told['sealed']} were sealed")
    return error(ours.logits["next"], specified.logits["next"])


HEAD = """# Models

What an XQuant cache does with a random model of each architecture that llama.cpp's own generator writes. Written by

```sh
PYTHONPATH=tests python -m support.models --write docs/models.md
```

Each model decodes a prompt of 600 tokens (130 with 256 learned positions) in micro-batches of 64 and of 512, then \
token by token; the tail is removed, a state is saved and loaded, positions are shifted: whatever an F16 cache can. \
*Open* is a plan that never seals, beside F16 without flash attention; *numpy*, sealed pages beside the specification \
applied to F16's own keys and values; *harm*, the default plan beside F16, which on random weights says little. All \
are squared errors over the variance of the logits, at the worst step.
"""


def page(rows: list[Row]) -> str:
    ran = [row for row in rows if not row.refused]
    needed = [row for row in rows if row.needed]
    counts = f"Of {len(needed)} models that run with a q8_0 cache, {sum(row.needed for row in ran)} run with XQuant."
    lines = ["| model | layers | head widths | open | numpy | harm |", "|---|---|---|---|---|---|"]
    for row in ran:
        errors = " | ".join(f"{x:.0e}" for x in (row.open, row.sealed, row.harm))
        lines.append(f"| {row.name} | {row.kind} | {row.shapes} | {errors} |")
    refused = [f"| {row.name} | {row.refused} |" for row in rows if row.refused]
    return "\n".join([HEAD, counts, "", *lines, "", "Refused:", "", "| model | why |", "|---|---|", *refused, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        models = upstream.make_models(Path(folder), args.names)
        for row in pool.map(examine, models):
            state = row.refused or "; ".join(row.failed) or "ok"
            print(f"{row.name:24} {row.kind:18} {row.open:8.0e} {row.sealed:8.0e} {row.harm:8.0e}  {state}", flush=True)
            rows.append(row)
    if args.write:
        args.write.write_text(page(rows))
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
