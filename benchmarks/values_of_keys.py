"""KL divergence that values cause which are read from codes of keys, per channel, as in latent attention.

usage: values_of_keys.py MODEL --text FILE [--tokens 2048] [--bits 4,3,2]

No small model with latent attention (MLA) is at hand: keys and values of any other are given both to codes of keys,
by the codec, in an F16 cache, and short passages are scored behind them (xquant_gguf/probe.py).  Beside it, the values
as the default preset stores them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from xquant_gguf.cli.text import table
from xquant_gguf.plan import PAGE, Side
from xquant_gguf.probe import Probe, Reading
from xquant_gguf.sides import key_side, read_back, value_side

EVERY, PASSAGE = 2 * PAGE, 32


def harm(reading: Reading, k: Side, v: Side, v_as: str) -> list[str]:
    """Mean and 99th percentile if all layers stored keys as k and values as v, which is a side of v_as."""
    changed = {
        (i, name): read_back(k if name == "k" else v, rows, "k" if name == "k" else v_as)
        for (i, name), rows in reading.rows.items()
    }
    kld = reading.kld(changed)
    return [f"{kld.mean():.4f}", f"{np.quantile(kld, 0.99):.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--bits", default="4,3,2")
    args = parser.parse_args()
    with Probe(args.model) as probe:
        tokens = probe.tokenize(Path(args.text).read_text())[: args.tokens + PASSAGE]
        n_read = len(tokens) // PAGE * PAGE
        lines = [["keys and values", "KLD", "99 %"]]
        starts = range(EVERY, len(tokens) - PASSAGE + 1, EVERY)
        with probe.reading(tokens, n_read, starts, PASSAGE) as reading:
            lines.append(
                ["xquant: 4 bits, 2 bits rotated", *harm(reading, key_side(4, rotate=False), value_side(2), "v")]
            )
            for bits in map(int, args.bits.split(",")):
                side = key_side(bits, rotate=False)
                lines.append([f"both per channel, {bits} bits", *harm(reading, side, side, "k")])
    print(table(lines))


if __name__ == "__main__":
    main()
