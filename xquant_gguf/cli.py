"""The command xquant-gguf: generate, inspect, calibrate, strip, evaluate, serve."""

from __future__ import annotations

import argparse
import codecs
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xquant_gguf.calibrate import Budget, Calibration, calibrate, unmeasured
from xquant_gguf.evaluate import evaluate
from xquant_gguf.llama import LLAMA_TYPES, Llama, checked_kv_type
from xquant_gguf.metadata import Key, copy_with_keys, splits, written_beside
from xquant_gguf.plan import PAGE, preset_names
from xquant_gguf.sizes import inspect_cache

UBATCH = "tokens of a micro-batch (default %(default)s)"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def bytes_table(sizes: Mapping[str, int | None], n_ctx: int) -> str:
    """KV bytes at n_ctx by cache type, against F16; a type that the model cannot have shows "-"."""
    f16 = sizes["f16"]
    rows = [["KV cache", f"MiB at {n_ctx}", "F16 / this"]]
    for name, size in sizes.items():
        rows.append([name, f"{size / 2**20:.1f}" if size else "-", f"{f16 / size:.2f}" if size and f16 else "-"])
    return table(rows)


def generate(args: argparse.Namespace) -> int:
    prompt = Path(args.prompt_file).read_text() if args.prompt_file else args.prompt
    kv_type = _kv_type(args)
    llm = Llama(args.model, kv_type=kv_type, kv_plan=args.kv_plan, n_ctx=args.n_ctx, verbose=False, **_threads(args))
    tokens = llm.tokenize(prompt.encode(), special=True)
    if not tokens:
        raise ValueError("the prompt is empty: --prompt or --prompt-file must give at least one token")
    if args.max_tokens >= llm.n_ctx():
        raise ValueError(f"--max-tokens is {args.max_tokens}, must be less than the context's {llm.n_ctx()} tokens")
    if len(tokens) + args.max_tokens > llm.n_ctx():
        tokens = tokens[: llm.n_ctx() - args.max_tokens]
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
    preset, n_ubatch = kv_type if llm.is_xquant else "xquant", llm.context_params.n_ubatch
    try:
        _, sizes, n_ctx = inspect_cache(args.model, preset, args.kv_plan, n_ctx=llm.n_ctx(), n_ubatch=n_ubatch)
    except ValueError as error:  # a model with another kind of state, run with a cache type of llama.cpp
        print(f"no table of KV bytes: {error}", file=sys.stderr)
    else:
        print(bytes_table(sizes, n_ctx))
    return 0


def run_calibrate(args: argparse.Namespace) -> int:
    if not args.output and not args.metadata_only:
        raise ValueError("name an output file, or --metadata-only FILE.json")
    budget = Budget(args.bits, False) if args.equivalent_bits is None else Budget(args.equivalent_bits, True)
    if args.data_free or args.preset:
        result = unmeasured(args.model, budget, args.preset)
    else:
        text = Path(args.text).read_text() if args.text else None
        result = calibrate(args.model, budget, text=text, n_threads=args.threads, maps=not args.no_maps)
    print(plan_text(result))
    if args.metadata_only:
        with written_beside(Path(args.metadata_only)) as part:
            part.write_text(json.dumps(result.plan.to_dict(), indent=1) + "\n")
        print(f"plan: {args.metadata_only}")
    if args.output:
        copy(args.model, args.output, result.keys())
    return 0


def plan_text(result: Calibration) -> str:
    """A plan as a table, with its quality and its sizes."""
    plan, shapes = result.plan, result.shapes
    rows = [["layer", "K", "V", *(["harm of K1", "of V1"] if result.sensitivity else [])]]
    for i, (number, layer) in enumerate(zip(result.layers, plan.layers, strict=True)):
        k = f"{layer.k.bits} bits" + (f", {layer.k.group} tokens" if layer.k.group != PAGE else "")
        v = f"{layer.v.bits} bits" + (f" + layer {result.layers[layer.v.source]}" if layer.v.source >= 0 else "")
        rows.append([str(number), k + f", {layer.k.param}", v, *(f"{s[i]:.5f}" for s in result.sensitivity.values())])
    lines = [
        f"{plan.preset}: {plan.true_bits(shapes):.3f} true bits, {plan.equivalent_bits():.3f} equivalent bits a value"
    ]
    if plan.expected_kld is not None:
        lines.append(f"expected KL divergence from F16: {plan.expected_kld:.4f}")
    sizes = [["tokens", "MiB", "F16 / this"]]
    for n_ctx in (4096, 32768, 131072):
        f16 = 2 * n_ctx * sum((s.d + s.e) * s.heads for s in shapes)
        size = plan.cache_bytes(shapes, n_ctx)
        sizes.append([str(n_ctx), f"{size / 2**20:.1f}", f"{f16 / size:.2f}"])
    return "\n".join([*lines, "", table(rows), "", table(sizes), ""])


def copy(model: str, output: str, keys: Mapping[str, Key]) -> None:
    """Copies a model with these xquant keys, with a progress bar."""
    size = sum(part.stat().st_size for part in splits(Path(model)))
    with tqdm(total=size, unit="B", unit_scale=True, desc=output, disable=None) as bar:
        copy_with_keys(model, output, keys, bar.update)


def strip(args: argparse.Namespace) -> int:
    copy(args.model, args.output, {})
    return 0


def inspect(args: argparse.Namespace) -> int:
    preset = _kv_type(args)
    if preset in LLAMA_TYPES:
        raise ValueError(f"kv_type is {preset!r}, must be one of {', '.join(preset_names())} to inspect its plan")
    info, sizes, n_ctx = inspect_cache(args.model, preset, args.kv_plan, n_ctx=args.n_ctx, n_ubatch=args.n_ubatch)
    info["kernels"] = Llama.kernels()
    if args.json:
        keys = ("preset", "layers", "k_bits", "v_bits", "equivalent_bits", "true_bits", "window", "kernels")
        settings = {"n_ctx": n_ctx, "n_ubatch": args.n_ubatch}
        print(json.dumps({**{k: info[k] for k in keys}, **settings, "kv_bytes": sizes}, indent=2))
        return 0
    rows = [["layer", "K bits", "V bits"]]
    rows += [[str(i), str(k), str(v)] for i, k, v in zip(info["layers"], info["k_bits"], info["v_bits"], strict=True)]
    print(
        f"{info['preset']}: {info['true_bits']:.3f} true bits, {info['equivalent_bits']:.3f} equivalent bits a value;"
    )
    print(f"the newest {info['window']} tokens in F16; kernels {info['kernels']}\n\n{table(rows)}\n")
    print(bytes_table(sizes, n_ctx))
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


def _kv_type(args: argparse.Namespace) -> str:
    """--kv-type, or what --kv-plan says, or xquant."""
    kv_type = args.kv_type if args.kv_type or args.kv_plan else "xquant"
    return checked_kv_type(kv_type, args.kv_plan, {}) or "xquant"


def _at_least(low: int) -> Callable[[str], int]:
    """An argparse type: an integer not below low."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,9}", text) or int(text) < low:
            raise argparse.ArgumentTypeError(f"is {text!r}, must be an integer of at least {low}")
        return int(text)

    return parse


def _threads(args: argparse.Namespace) -> dict[str, Any]:
    return {"n_threads": args.threads, "n_threads_batch": args.threads}


def run_serve(args: argparse.Namespace) -> int:
    try:
        from xquant_gguf.serve import serve
    except ModuleNotFoundError as error:
        raise ValueError(f"serve needs {error.name}, which is not there: pip install 'xquant-gguf[server]'") from error
    return serve(args.options)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="xquant-gguf", description="XQuant, an ultra-low-bit KV cache for llama.cpp")
    commands = top.add_subparsers(dest="command", required=True)
    names = ", ".join((*preset_names(), *LLAMA_TYPES))

    def command(name: str, function: Any, text: str, *, n_ctx: int | None) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        sub.add_argument("model", help="GGUF file")
        text = "tokens of the context; 0: those the model was trained with (default %(default)s)"
        if n_ctx is not None:
            sub.add_argument("--n-ctx", type=_at_least(0), default=n_ctx, help=text)
        sub.add_argument("--threads", type=_at_least(1), default=None, help="CPU threads (default: llama.cpp's)")
        return sub

    sub = command("generate", generate, "continue a prompt; speed and cache size afterwards", n_ctx=4096)
    sub.add_argument("--prompt", default="The history of the computer begins", help="text to continue")
    sub.add_argument("--prompt-file", help="file with the text to continue")
    sub.add_argument("--max-tokens", type=_at_least(1), default=128)
    sub.add_argument("--temperature", type=float, default=0.0)
    _cache_options(sub, names)
    sub = command("inspect", inspect, "what the cache stores, and its bytes at a context length", n_ctx=32768)
    sub.add_argument("--n-ubatch", type=_at_least(1), default=512, help=UBATCH)
    sub.add_argument("--json", action="store_true", help="print JSON")
    _cache_options(sub, names)
    text = "choose the best cache for a model and write it into a copy of its file"
    sub = command("calibrate", run_calibrate, text, n_ctx=None)
    sub.add_argument("output", nargs="?", help="the copy to write")
    size = sub.add_mutually_exclusive_group()
    size.add_argument("--bits", type=float, default=3.0, help="true bits a value (default %(default)s)")
    size.add_argument("--equivalent-bits", type=float, help="bits of codes a value, as the paper counts them")
    size.add_argument("--preset", choices=preset_names(), help="write this preset, measure nothing")
    sub.add_argument("--text", help="text to measure with, at least 1,280 tokens (default: a built-in one)")
    sub.add_argument("--data-free", action="store_true", help="derive the plan from the architecture alone")
    sub.add_argument("--no-maps", action="store_true", help="predict no layer's values from another's")
    sub.add_argument("--metadata-only", metavar="FILE.json", help="write the plan, for kv_plan")
    sub = command("strip", strip, "copy a model without its cache plan", n_ctx=None)
    sub.add_argument("output", help="the copy to write")
    sub = command("evaluate", run_evaluate, "perplexity and KL divergence from the F16 cache on a text", n_ctx=4096)
    sub.add_argument("--text", required=True, help="text file")
    sub.add_argument("--kv-types", default="f16,q8_0,q4_0,xquant,xquant-small,xquant-tiny", help=f"any of {names}")
    sub.add_argument("--tokens", type=_at_least(2), default=4096, help="tokens of the text (default %(default)s)")
    sub.add_argument("--skip", type=_at_least(0), default=512, help="first positions of a window that are not scored")
    sub.add_argument("--n-ubatch", type=_at_least(1), default=512, help=UBATCH)
    sub.add_argument("--json", help="file for the results")
    # its own options are those of llama_cpp's server, which is an extra: serve parses them
    text = "OpenAI-compatible server; options as python -m llama_cpp.server, --kv-type and --kv-plan"
    commands.add_parser("serve", help=text, add_help=False).set_defaults(function=run_serve)
    return top


def _cache_options(sub: argparse.ArgumentParser, names: str) -> None:
    sub.add_argument("--kv-type", help=f"one of {names} (default: the plan's preset, or xquant)")
    sub.add_argument("--kv-plan", help="JSON file with a plan")


def main(argv: Sequence[str] | None = None) -> int:
    top = parser()
    args, options = top.parse_known_args(argv)
    args.options = options
    if options and args.function is not run_serve:
        top.error(f"unrecognized arguments: {' '.join(options)}")
    try:
        return int(args.function(args))
    except (ValueError, OSError) as error:
        print(f"xquant-gguf: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
