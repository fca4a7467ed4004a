"""What context shifts cost: KL divergence from an F16 cache that goes through the same.

usage: shift.py MODEL --text FILE [--tokens 1280] [--kv-types q8_0,q4_0,xquant] [--json FILE]

A context is filled, and shifted as programs do it: the first page stays, the next tokens are dropped, and what follows
moves down by as many.  The next tokens of the text are scored one by one.  Without a shift, after one, and after eight,
as a long chat does it, each in a context of its own: the window and the pinned page are open in all of them, so that
shifts alone differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xquant_gguf.cli.text import table
from xquant_gguf.divergence import Expected
from xquant_gguf.evaluate import load, log_probabilities
from xquant_gguf.llama import Llama
from xquant_gguf.plan import PAGE

BY = 64
COUNTS = (0, 1, 8)


def scores(llm: Llama, tokens: list[int], n_tokens: int, shifts: int) -> NDArray[np.float32]:
    """Log-probabilities behind each of the tokens from n_tokens on."""
    llm.session.clear()
    for first in range(0, n_tokens, llm.n_batch):
        log_probabilities(llm, tokens[first : min(first + llm.n_batch, n_tokens)], first)
    end = n_tokens
    for _ in range(shifts):
        llm.session.remove(0, PAGE, PAGE + BY)
        llm.session.shift(0, PAGE + BY, -1, -BY)
        end -= BY
        # shifts are carried out when something is decoded
        log_probabilities(llm, tokens[n_tokens : n_tokens + 1], end)
        llm.session.remove(0, end)
    return np.stack([log_probabilities(llm, [token], end + i)[0] for i, token in enumerate(tokens[n_tokens:])])


def kld(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(Expected(a).kld(b).mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1280)
    parser.add_argument("--scored", type=int, default=128)
    parser.add_argument("--kv-types", default="q8_0,q4_0,xquant,xquant-small,xquant-tiny")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    common: dict[str, Any] = {"n_ctx": 2048, "n_batch": 128, "n_ubatch": 128, "verbose": False}
    common.update(n_threads=args.threads, n_threads_batch=args.threads)
    rows: list[dict[str, Any]] = []
    expected: list[NDArray[np.float32]] = []
    for kv in dict.fromkeys(("f16", *args.kv_types.split(","))):
        llm = load(args.model, kv, common)
        tokens = llm.tokenize(args.text.read_bytes())[: args.tokens + args.scored]
        found = [scores(llm, tokens, args.tokens, shifts) for shifts in COUNTS]
        llm.close()
        expected = expected or found
        if kv != "f16":
            klds = [kld(*pair) for pair in zip(expected, found, strict=True)]
            rows += [{"kv_type": kv, "shifts": n, "kld": k} for n, k in zip(COUNTS, klds, strict=True)]
    by_type = {kv: [r["kld"] for r in rows if r["kv_type"] == kv] for kv in dict.fromkeys(r["kv_type"] for r in rows)}
    header = ["KV cache", *(f"{shifts} shifts" for shifts in COUNTS), "8 / 0"]
    cells = [[kv, *(f"{k:.5f}" for k in klds), f"{klds[-1] / klds[0]:.2f}"] for kv, klds in by_type.items()]
    print(table([header, *cells]))
    if args.json:
        args.json.write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
