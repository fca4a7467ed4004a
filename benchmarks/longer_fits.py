"""What lengthening the fits of values and keys does to a model's answer (native/common/codec_fit.h).

usage: longer_fits.py MODEL --text FILE [--skip 300000] [--values 1,2,3] [--keys 1,2] [--much 0,0.6,1,1.25,1.5]

2,048 tokens of the text, from its character `skip` on, are read once with an F16 cache; then values or keys of all
layers, all pages but the first, are what codes of so many bits give back, of a fit that is lengthened by `much` times
the share of the variance that it leaves over.  Mean KL divergence at 15 passages of 32 tokens, and its standard error.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from unittest import mock

import numpy as np

from passages import N_READ, PASSAGE, mean, tokens_of
from xquant_gguf import reference
from xquant_gguf.cli.text import table
from xquant_gguf.plan import PAGE, Side
from xquant_gguf.probe import Probe, Rows
from xquant_gguf.sides import key_side, value_side

EVERY = 128


def read_back(rows: Rows, side: Side, is_k: bool) -> Rows:
    """Rows [head][token][width] as pages of codes give them back, all but those of the first page."""
    n_heads, _, width = rows.shape
    pages = rows[:, PAGE:].astype(np.float32).reshape(n_heads, -1, PAGE, width)
    # elements of a group first: of keys the tokens of a page, one group a channel; of values channels
    x: reference.Floats = pages.transpose(2, 0, 1, 3).reshape(PAGE, -1) if is_k else pages.reshape(-1, width).T
    x = np.ascontiguousarray(x) if is_k else reference.hadamard(np.ascontiguousarray(x))
    codes, p = reference.quantize(x, side)
    y = p.base + p.scale * (codes.astype(np.float32) - p.middle)
    found = y.reshape(PAGE, n_heads, -1, width).transpose(1, 2, 0, 3) if is_k else reference.hadamard(y).T
    out = rows.copy()
    out[:, PAGE:] = found.reshape(n_heads, -1, width)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--skip", type=int, default=300000)
    parser.add_argument("--values", default="1,2,3")
    parser.add_argument("--keys", default="1,2")
    parser.add_argument("--much", default="0,0.6,1,1.25,1.5")
    args = parser.parse_args()
    muches = [float(text) for text in args.much.split(",")]
    lines = [["much", *(f"{much:g}" for much in muches)]]
    with Probe(args.model) as probe:
        tokens = tokens_of(args.text, args.skip, probe)
        with probe.reading(tokens, N_READ, range(2 * PAGE, N_READ + 1, EVERY), PASSAGE) as reading:
            for name, bits_of, side_of in (("v", args.values, value_side), ("k", args.keys, key_side)):
                for bits in (int(text) for text in bits_of.split(",") if text):
                    line = [f"{name.upper()} of {bits} bits"]
                    for much in muches:
                        longer = np.float32(much)
                        with mock.patch.multiple(reference, LONGER_LLOYD=longer, LONGER_CLIP=longer):
                            changed = {
                                at: read_back(rows, side_of(bits), name == "k")
                                for at, rows in reading.rows.items()
                                if at[1] == name
                            }
                        kld = reading.kld(changed)
                        line.append(mean(kld))
                    lines.append(line)
    print(table(lines))


if __name__ == "__main__":
    main()
