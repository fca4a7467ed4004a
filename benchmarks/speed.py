"""Prompt and decode speed of KV cache types side by side: tokens/s and ratios to F16, in interleaved rounds.

usage: speed.py MODEL [--depths 512,4096] [--kv-types f16,q8_0,q4_0,xquant] [--rounds 3] [--threads 2] [--json FILE]

At each depth a prompt of 256 tokens is read and then 16 tokens are decoded, one by one, in a cache that holds `depth`
tokens of the same text; medians over rounds.  Machines are noisy: read the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from xquant_gguf import Llama
from xquant_gguf.cli import table

N_PROMPT, N_DECODE = 256, 16


def measure(llm: Llama, tokens: list[int], depth: int) -> tuple[float, float]:
    """Prompt and decode tokens/s at a depth; the cache is left as it was."""
    ctx = llm._ctx
    ctx.kv_cache_seq_rm(0, depth, -1)
    start = time.perf_counter()
    llm._batch.set_batch(tokens[depth : depth + N_PROMPT], depth, logits_all=False)
    ctx.decode(llm._batch)
    middle = time.perf_counter()
    for i in range(depth + N_PROMPT, depth + N_PROMPT + N_DECODE):
        llm._batch.set_batch(tokens[i : i + 1], i, logits_all=False)
        ctx.decode(llm._batch)
    end = time.perf_counter()
    ctx.kv_cache_seq_rm(0, depth, -1)
    return N_PROMPT / (middle - start), N_DECODE / (end - middle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--depths", default="512,4096")
    parser.add_argument("--kv-types", default="f16,q8_0,q4_0,xquant,xquant-small,xquant-tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    args = parser.parse_args()
    depths = sorted(int(d) for d in args.depths.split(","))
    kv_types = args.kv_types.split(",")
    n_ctx = depths[-1] + 512
    options = {"n_ctx": n_ctx, "verbose": False, "n_threads": args.threads, "n_threads_batch": args.threads}
    models = {kv: Llama(args.model, kv_type=kv, flash_attn=True, **options) for kv in kv_types}
    text = (Path(__file__).parent.parent / "README.md").read_text()
    one = models[kv_types[0]].tokenize(text.encode())
    tokens = (one * (n_ctx // len(one) + 1))[:n_ctx]

    rows, results, filled = [["depth", "KV cache", "prompt t/s", "/ F16", "decode t/s", "/ F16"]], [], 0
    for depth in depths:
        for llm in models.values():
            for i in range(filled, depth, llm.n_batch):
                llm._batch.set_batch(tokens[i : min(i + llm.n_batch, depth)], i, logits_all=False)
                llm._ctx.decode(llm._batch)
        filled = depth
        runs: dict[str, list[tuple[float, float]]] = {kv: [] for kv in kv_types}
        for _ in range(args.rounds):
            for kv, llm in models.items():
                runs[kv].append(measure(llm, tokens, depth))
        medians = {kv: [statistics.median(run[i] for run in runs[kv]) for i in (0, 1)] for kv in kv_types}
        base = medians[kv_types[0]]
        for kv, (prompt, decode) in medians.items():
            numbers = (f"{prompt:.1f}", f"{prompt / base[0]:.2f}", f"{decode:.1f}", f"{decode / base[1]:.2f}")
            rows.append([str(depth), kv, *numbers])
            kv_bytes = models[kv].kv_cache_info()["bytes_allocated"]
            result = {"kv_type": kv, "depth": depth, "prompt_tps": prompt, "decode_tps": decode, "kv_bytes": kv_bytes}
            results.append(result)
    print(table(rows))
    if args.json:
        settings = {"model": Path(args.model).name, "threads": args.threads, "rounds": args.rounds}
        Path(args.json).write_text(json.dumps({"results": results, **settings}, indent=2) + "\n")


if __name__ == "__main__":
    main()
