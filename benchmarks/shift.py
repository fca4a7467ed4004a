"""What a context shift costs: KL divergence from an F16 cache that was not shifted.

usage: shift.py MODEL --text FILE [--tokens 1280] [--kv-types f16,q8_0,q4_0,xquant] [--json FILE]

A context is filled, all of its positions are moved by the same number, and the next tokens of the text are scored one
by one, then taken back.  Attention sees distances alone: but for what a shift does to the stored keys, nothing changes.
Scored before any shift, after one, and after eight, as a long chat does it.
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

BY = 64
COUNTS = (0, 1, 8)


def scores(llm: Llama, tokens: list[int], n_tokens: int) -> list[NDArray[np.float32]]:
    """For each of COUNTS, log-probabilities behind each of the tokens from n_tokens on."""
    for first in range(0, len(tokens), llm.n_batch):
        log_probabilities(llm, tokens[first : first + llm.n_batch], first)
    out, end = [], n_tokens
    for shifts in range(max(COUNTS) + 1):
        if shifts > 0:
            llm.session.shift(0, 0, -1, BY)
            end += BY
        llm.session.remove(0, end)
        # shifts are carried out when something is decoded
        scored = tokens[n_tokens:] if shifts in COUNTS else tokens[n_tokens : n_tokens + 1]
        rows = [log_probabilities(llm, [token], end + i)[0] for i, token in enumerate(scored)]
        if shifts in COUNTS:
            out.append(np.stack(rows))
    return out


def kld(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(Expected(a).kld(b).mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1280)
    parser.add_argument("--scored", type=int, default=128)
    parser.add_argument("--kv-types", default="f16,q8_0,q4_0,xquant,xquant-small,xquant-tiny")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    common: dict[str, Any] = {"n_ctx": 2048, "n_batch": 128, "n_ubatch": 128, "verbose": False}
    common.update(n_threads=args.threads, n_threads_batch=args.threads)
    rows, expected = [], None
    for kv in dict.fromkeys(("f16", *args.kv_types.split(","))):
        llm = load(args.model, kv, common)
        tokens = llm.tokenize(args.text.read_bytes())[: args.tokens + args.scored]
        for shifts, got in zip(COUNTS, scores(llm, tokens, args.tokens), strict=True):
            expected = got if expected is None else expected
            rows.append({"kv_type": kv, "shifts": shifts, "kld": kld(expected, got)})
        llm.close()
    by_type = {kv: [r["kld"] for r in rows if r["kv_type"] == kv] for kv in dict.fromkeys(r["kv_type"] for r in rows)}
    header = ["KV cache", *(f"{shifts} shifts" for shifts in COUNTS), "8 / 0"]
    cells = [
        [kv, *(f"{k:.5f}" for k in klds), f"{klds[-1] / klds[0]:.2f}" if klds[0] > 0 else "-"]
        for kv, klds in by_type.items()
    ]
    print(table([header, *cells]))
    if args.json:
        args.json.write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
