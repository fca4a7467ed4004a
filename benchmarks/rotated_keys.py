"""What coordinates of keys do to a model's answer: those in which they come, a Hadamard matrix's, and their own.

usage: rotated_keys.py MODEL --text FILE [--skip 300000] [--bits 4,3,2] [--fits minmax,lloyd,clip] [--threads 1]

2,048 tokens of the text, from its character `skip` on, are read once with an F16 cache; then the keys of all layers,
all pages but the first, are what codes of so many bits give back in each of the coordinates (xquant_gguf/transforms.py;
their own are those of the built-in calibration text).  Mean KL divergence at 17 passages of 32 tokens, whose last 128
tokens before them stay exact, and its standard error.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from passages import N_READ, PASSAGE, mean, tokens_of
from xquant_gguf.calibrate import FIT_TOKENS, TEXT
from xquant_gguf.cli.text import table
from xquant_gguf.plan import PAGE
from xquant_gguf.probe import Probe
from xquant_gguf.sides import KeyForm, key_side, read_back_keys
from xquant_gguf.transforms import coordinates

FIRST, EVERY = 512, 96
ETA = {("minmax", 3): 0.02, ("lloyd", 4): 0.01, ("lloyd", 3): 0.06, ("lloyd", 2): 0.12}
"""Where fits begin that is not 0."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--skip", type=int, default=300000)
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--fits", default="minmax,lloyd,clip")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    lines = [["keys", "fit", "not rotated", "rotated", "in coordinates of their own"]]
    with Probe(args.model, args.threads) as probe:
        n = len(probe.layers)
        fitted = probe.tokenize(TEXT.read_text())[:FIT_TOKENS]
        with probe.reading(fitted, len(fitted) // PAGE * PAGE) as reading:
            own = [KeyForm(matrices=coordinates(reading.rows[i, "k"], reading.queries[i])) for i in range(n)]
        tokens = tokens_of(args.text, args.skip, probe)
        with probe.reading(tokens, N_READ, range(FIRST, N_READ + 1, EVERY), PASSAGE, PAGE) as reading:
            for bits in map(int, args.bits.split(",")):
                for fit in args.fits.split(","):
                    side = replace(key_side(bits), fit=fit, eta=ETA.get((fit, bits), 0.0))
                    line = [f"{bits} bits", fit]
                    for forms in ([KeyForm()] * n, [KeyForm(rotate=True)] * n, own):
                        changed = {
                            (i, "k"): read_back_keys(side, reading.rows[i, "k"], form) for i, form in enumerate(forms)
                        }
                        line.append(mean(reading.kld(changed)))
                    lines.append(line)
    print(table(lines))


if __name__ == "__main__":
    main()
