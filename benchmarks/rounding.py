"""What the 8-bit rounding of folded vectors does to attention over a model's own keys and values.

usage: rounding.py MODEL --text FILE [--tokens 4096] [--presets xquant,xquant-small,xquant-tiny]

Every layer's first KV head, all pages sealed, four queries each (tests/support/real_rows.py): the error of an output
against float64 over the same codes, as a share of the output (norms).  scalar is the exact set.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from support import real_rows
from xquant_gguf import codec
from xquant_gguf.cli.text import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--presets", default="xquant,xquant-small,xquant-tiny")
    args = parser.parse_args()
    text = Path(args.text).read_text(errors="replace")
    lines = [["preset", "kernels", "median", "90 %", "worst"]]
    for preset in args.presets.split(","):
        found = list(real_rows.errors(args.model, text, args.tokens, preset, codec.kernel_sets()))
        for name in codec.kernel_sets():
            errors = np.array([row[name] for row in found])
            shares = [f"{x * 100:.4f} %" for x in (np.median(errors), np.quantile(errors, 0.9), errors.max())]
            lines.append([preset, name, *shares])
    print(table(lines))


if __name__ == "__main__":
    main()
