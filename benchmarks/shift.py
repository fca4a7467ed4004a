"""What a context shift costs: KL divergence from an F16 cache that was not shifted.

usage: shift.py MODEL --text FILE [--tokens 1536] [--kv-types f16,q8_0,q4_0,xquant] [--json FILE]

A context is filled, all of its positions are moved by the same number, and the next tokens of the text are scored one
by one.  Attention sees distances alone: but for what a shift does to the stored keys, nothing changes.  Moved not at
all (0 shifts), at once (1), and in many small steps, as a long chat does it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xquant_gguf.cli import table
from xquant_gguf.evaluate import load, log_probabilities
from xquant_gguf.llama import Llama

BY = 512
STEPS = (0, 1, 8)


def scores(llm: Llama, tokens: list[int], n_tokens: int, steps: int) -> NDArray[np.float32]:
    """Log-probabilities behind each of the tokens from n_tokens on, after that many shifts."""
    llm._ctx.kv_cache_clear()
    for first in range(0, n_tokens, llm.n_batch):
        log_probabilities(llm, tokens[first : min(first + llm.n_batch, n_tokens)], first)
    at = n_tokens
    for _ in range(steps):
        llm._ctx.kv_cache_seq_shift(0, 0, -1, BY // steps)
        at += BY // steps
        # shifts are carried out when something is decoded: a token that is taken back
        log_probabilities(llm, tokens[n_tokens : n_tokens + 1], at)
        llm._ctx.kv_cache_seq_rm(0, at, -1)
    return np.vstack([log_probabilities(llm, [t], at + i) for i, t in enumerate(tokens[n_tokens:])])


def kld(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.einsum("ij,ij->i", np.exp(a), a - b, dtype=np.float64).mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--scored", type=int, default=256)
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
        for steps in STEPS:
            got = scores(llm, tokens, args.tokens, steps)
            expected = got if expected is None else expected
            rows.append({"kv_type": kv, "steps": steps, "kld": kld(expected, got)})
        llm.close()
    by_type = {kv: [r["kld"] for r in rows if r["kv_type"] == kv] for kv in dict.fromkeys(r["kv_type"] for r in rows)}
    header = ["KV cache", *(f"{steps} shifts" for steps in STEPS), "8 shifts / none"]
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
