"""The command xquant-gguf: generate, inspect, evaluate."""

from __future__ import annotations

import argparse
import codecs
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xquant_gguf.evaluate import evaluate
from xquant_gguf.llama import LLAMA_TYPES, Llama, cache_table
from xquant_gguf.plan import preset_names


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def bytes_table(llm: Llama, n_ctx: int) -> str:
    """KV bytes at n_ctx for F16, q8_0, q4_0 and the model's own XQuant cache."""
    sizes = cache_table(llm, n_ctx)
    rows = [["KV cache", f"MiB at {n_ctx}", "F16 / this"]]
    rows += [[name, f"{size / 2**20:.1f}", f"{sizes['f16'] / size:.2f}"] for name, size in sizes.items()]
    return table(rows)


def generate(args: argparse.Namespace) -> int:
    prompt = Path(args.prompt_file).read_text() if args.prompt_file else args.prompt
    llm = Llama(
        args.model, kv_type=args.kv_type, kv_plan=args.kv_plan, n_ctx=args.n_ctx, verbose=False, **_threads(args)
    )
    tokens = llm.tokenize(prompt.encode(), special=True)
    if len(tokens) + args.max_tokens > llm.n_ctx():
        tokens = tokens[: max(llm.n_ctx() - args.max_tokens, 1)]
        print(f"prompt cut to {len(tokens)} tokens to fit --n-ctx {llm.n_ctx()}", file=sys.stderr)

    start = time.perf_counter()
    with tqdm(total=len(tokens), unit="token", desc="prompt", file=sys.stderr) as bar:
        for i in range(0, len(tokens), llm.n_batch):
            llm.eval(tokens[i : i + llm.n_batch])
            bar.update(len(tokens[i : i + llm.n_batch]))
    prompt_time = time.perf_counter() - start

    text, n = codecs.getincrementaldecoder("utf-8")("replace"), 0
    start = time.perf_counter()
    while n < args.max_tokens:
        token = llm.sample(temp=args.temperature, repeat_penalty=1.1)
        if token == llm.token_eos():
            break
        print(text.decode(llm.detokenize([token])), end="", flush=True)
        llm.eval([token])
        n += 1
    decode_time = time.perf_counter() - start
    print(text.decode(b"", True), flush=True)

    print(f"\nprompt {len(tokens)} tokens, {len(tokens) / prompt_time:.1f} tokens/s; ", end="")
    print(f"decode {n} tokens, {n / max(decode_time, 1e-9):.1f} tokens/s\n")
    if llm.is_xquant:
        print(bytes_table(llm, llm.n_ctx()))
    return 0


def inspect(args: argparse.Namespace) -> int:
    llm = Llama(args.model, kv_type=args.kv_type, kv_plan=args.kv_plan, n_ctx=256, verbose=False)
    info = llm.kv_cache_info()
    sizes = cache_table(llm, args.n_ctx)
    if args.json:
        keys = ("preset", "layers", "k_bits", "v_bits", "equivalent_bits", "true_bits", "window", "kernels")
        print(json.dumps({**{k: info[k] for k in keys}, "n_ctx": args.n_ctx, "kv_bytes": sizes}, indent=2))
        return 0
    rows = [["layer", "K bits", "V bits"]]
    rows += [[str(i), str(k), str(v)] for i, k, v in zip(info["layers"], info["k_bits"], info["v_bits"], strict=True)]
    print(
        f"{info['preset']}: {info['true_bits']:.3f} true bits, {info['equivalent_bits']:.3f} equivalent bits a value, "
    )
    print(f"the newest {info['window']} tokens in F16; kernels {info['kernels']}\n\n{table(rows)}\n")
    print(bytes_table(llm, args.n_ctx))
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    text = Path(args.text).read_text(errors="replace")
    kv_types = args.kv_types.split(",")
    out = evaluate(
        args.model, text, kv_types, n_tokens=args.tokens, n_ctx=args.n_ctx, skip=args.skip, n_ubatch=args.n_ubatch,
        n_threads=args.threads,
    )  # fmt: skip
    rows = [["KV cache", "true bits", "equivalent", "MiB", "PPL", "KLD", "KLD 99%", "top-1 %"]]
    for r in out["results"]:
        numbers = [f"{r['true_bits']:.2f}", f"{r['equivalent_bits']:.2f}", f"{r['kv_bytes'] / 2**20:.1f}"]
        numbers += [f"{r['ppl']:.3f}", f"{r['kld']:.4f}", f"{r['kld_p99']:.3f}", f"{100 * r['top1']:.1f}"]
        rows.append([r["kv_type"], *numbers])
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(out, indent=2) + "\n")
    return 0


def _threads(args: argparse.Namespace) -> dict[str, Any]:
    return {"n_threads": args.threads, "n_threads_batch": args.threads}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="xquant-gguf", description="XQuant, an ultra-low-bit KV cache for llama.cpp")
    commands = top.add_subparsers(dest="command", required=True)
    names = ", ".join((*preset_names(), *LLAMA_TYPES))

    def command(name: str, function: Any, text: str, *, n_ctx: int) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        sub.add_argument("model", help="GGUF file")
        sub.add_argument("--n-ctx", type=int, default=n_ctx, help="tokens of the context (default %(default)s)")
        sub.add_argument("--threads", type=int, default=None, help="CPU threads (default: llama.cpp's)")
        return sub

    sub = command("generate", generate, "continue a prompt; speed and cache size afterwards", n_ctx=4096)
    sub.add_argument("--prompt", default="The history of the computer begins", help="text to continue")
    sub.add_argument("--prompt-file", help="file with the text to continue")
    sub.add_argument("--max-tokens", type=int, default=128)
    sub.add_argument("--temperature", type=float, default=0.0)
    _cache_options(sub, names)
    sub = command("inspect", inspect, "what the cache stores, and its bytes at a context length", n_ctx=32768)
    sub.add_argument("--json", action="store_true", help="print JSON")
    _cache_options(sub, names)
    sub = command("evaluate", run_evaluate, "perplexity and KL divergence from the F16 cache on a text", n_ctx=4096)
    sub.add_argument("--text", required=True, help="text file")
    sub.add_argument("--kv-types", default="f16,q8_0,q4_0,xquant,xquant-small,xquant-tiny", help=f"any of {names}")
    sub.add_argument("--tokens", type=int, default=4096, help="tokens of the text (default %(default)s)")
    sub.add_argument("--skip", type=int, default=512, help="first positions of a window that are not scored")
    sub.add_argument("--n-ubatch", type=int, default=512, help="tokens of a micro-batch")
    sub.add_argument("--json", help="file for the results")
    return top


def _cache_options(sub: argparse.ArgumentParser, names: str) -> None:
    sub.add_argument("--kv-type", default="xquant", help=f"one of {names} (default %(default)s)")
    sub.add_argument("--kv-plan", help="JSON file with a plan")


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return int(args.function(args))
    except (ValueError, OSError) as error:
        print(f"xquant-gguf: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
