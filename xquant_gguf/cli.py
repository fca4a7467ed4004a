"""The command xquant-gguf: generate, inspect, calibrate, strip, evaluate, plot, bench, serve."""

from __future__ import annotations

import argparse
import codecs
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xquant_gguf.bench import bench
from xquant_gguf.calibrate import Budget, Calibration, calibrate, unmeasured
from xquant_gguf.evaluate import evaluate
from xquant_gguf.llama import LLAMA_TYPES, Llama, checked_kv_type
from xquant_gguf.metadata import Key, copy_with_keys, splits, written_beside
from xquant_gguf.plan import PAGE, preset_names
from xquant_gguf.plot import plot
from xquant_gguf.sizes import inspect_cache
from xquant_gguf.synthetic import SHAPES
from xquant_gguf.synthetic import write as write_shape
from xquant_gguf.tasks import TASKS, run, task_of

UBATCH = "tokens of a micro-batch (default %(default)s)"


TASK_TEXT = "quality of KV cache types: perplexity and KL divergence from F16 on a text, or answers to a task"
PLOT_TEXT = "draw KL divergence against bits (of evaluate), and sensitivity by layer (of calibrate), as PNG"
TASK_OPTIONS = ("data", "limit", "max_tokens", "lengths", "depths", "repeats", "seed")


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
    if args.json and (args.data_free or args.preset):
        raise ValueError("--json holds what was measured, and --data-free and --preset measure nothing: leave one out")
    budget = Budget(args.bits, False) if args.equivalent_bits is None else Budget(args.equivalent_bits, True)
    if args.data_free or args.preset:
        result = unmeasured(args.model, budget, args.preset)
    else:
        text = Path(args.text).read_text() if args.text else None
        result = calibrate(args.model, budget, text=text, n_threads=args.threads, maps=not args.no_maps)
    print(plan_text(result))
    if args.metadata_only:
        _write_json(args.metadata_only, result.plan.to_dict())
        print(f"plan: {args.metadata_only}")
    if args.json:
        _write_json(args.json, {"model": Path(args.model).name, **result.to_dict()})
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
    if args.task:
        return run_task(args)
    if not args.text:
        raise ValueError("name a text with --text FILE, or a task with --task")
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
        _write_json(args.json, out)
    return 0


def run_task(args: argparse.Namespace) -> int:
    if args.text:
        raise ValueError("--text is no option of a task: --data FILE names its questions")
    task = task_of(args.task, {name: getattr(args, name) for name in TASK_OPTIONS})
    beside = Path(args.json).with_suffix(".items.jsonl") if args.json else None
    out = run(
        args.model, task, args.kv_types.split(","), n_ctx=args.n_ctx, n_ubatch=args.n_ubatch, n_threads=args.threads,
        answers_path=beside,
    )  # fmt: skip
    near = [name for name in out["results"][0] if name.endswith("_to_f16")]
    rows = [["KV cache", "true bits", "items", *task.metrics, "+-", "same as f16 %", *near, "tokens", "in codes"]]
    for r in out["results"]:
        numbers = [f"{r['true_bits']:.2f}", str(r["n"]), *(f"{r[m]:.3f}" for m in task.metrics)]
        numbers += [f"{r[task.metrics[0] + '_stderr']:.3f}"]
        numbers += [f"{100 * r['same_as_f16']:.1f}" if "same_as_f16" in r else "-"]
        numbers += [f"{r[name]:.3f}" for name in near]
        rows.append([r["kv_type"], *numbers, f"{r['tokens']:.0f}", f"{r['tokens_in_codes']:.0f}"])
    print(table(rows))
    if "table" in out:
        depths = sorted({r["depth"] for r in out["table"]})
        cells = {(r["kv_type"], r["length"], r["depth"]): r for r in out["table"]}
        rows = [["found, by depth", "tokens", *(f"{d:g}" for d in depths)]]
        for kv, length in dict.fromkeys((r["kv_type"], r["length"]) for r in out["table"]):
            found = [cells[kv, length, d] for d in depths]
            rows.append([kv, str(length), *(f"{r['found'] * r['n']:.0f}/{r['n']}" for r in found)])
        print(f"\n{table(rows)}")
    if args.json:
        _write_json(args.json, out)
    return 0


def run_plot(args: argparse.Namespace) -> int:
    plot(args.results, args.out)
    return 0


def _write_json(path: str, value: Mapping[str, Any]) -> None:
    with written_beside(Path(path)) as part:
        part.write_text(json.dumps(value, indent=1) + "\n")


def _depth(text: str) -> int:
    try:
        return _at_least(0)(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--depths {error}") from error


def run_bench(args: argparse.Namespace) -> int:
    if (args.model is None) == (args.shape is None):
        raise ValueError("name a model, or --shape, but not both")
    if args.layers and not args.shape:
        raise ValueError(f"--layers is {args.layers}: it belongs to --shape")
    depths = [_depth(text) for text in args.depths.split(",")]
    kv_types = args.kv_types.split(",")
    with tempfile.TemporaryDirectory() as folder:
        model = write_shape(Path(folder) / "random.gguf", args.shape, args.layers or 0) if args.shape else args.model
        with tqdm(total=len(depths) * len(kv_types) * (args.rounds + 2), unit="step", file=sys.stderr) as bar:
            rows = bench(
                str(model), kv_types, depths, rounds=args.rounds, n_prompt=args.n_prompt, n_decode=args.n_decode,
                n_gpu_layers=args.n_gpu_layers, done=lambda _: bar.update(), **_threads(args),
            )  # fmt: skip
    base = {row.depth: row for row in rows if row.kv_type == kv_types[0]}
    first = f"/ {kv_types[0]}"
    lines = [["depth", "KV cache", "prompt t/s", first, "decode t/s", first, "MiB"]]
    for r in rows:
        b = base[r.depth]
        speeds = [f"{r.prompt_tps:.1f}", f"{r.prompt_tps / b.prompt_tps:.2f}"]
        speeds += [f"{r.decode_tps:.1f}", f"{r.decode_tps / b.decode_tps:.2f}"]
        lines.append([str(r.depth), r.kv_type, *speeds, f"{r.kv_bytes / 2**20:.1f}"])
    print(table(lines))
    if args.json:
        settings = {key: getattr(args, key) for key in ("rounds", "n_prompt", "n_decode", "n_gpu_layers", "layers")}
        settings["model"] = args.shape or Path(args.model).name
        out = {"results": [asdict(row) for row in rows], **settings}
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


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: values with commas between them."""

    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = "list"  # what argparse says is invalid
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

    def command(
        name: str, function: Any, text: str, *, n_ctx: int | None, optional: bool = False
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        sub.add_argument("model", nargs="?" if optional else None, help="GGUF file")
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
    sub.add_argument("--json", metavar="FILE.json", help="write the plan, each layer's sensitivity, and what made it")
    sub = command("strip", strip, "copy a model without its cache plan", n_ctx=None)
    sub.add_argument("output", help="the copy to write")
    sub = command("evaluate", run_evaluate, TASK_TEXT, n_ctx=4096)
    sub.add_argument("--text", help="text file")
    sub.add_argument("--kv-types", default="f16,q8_0,q4_0,xquant,xquant-small,xquant-tiny", help=f"any of {names}")
    sub.add_argument("--tokens", type=_at_least(2), default=4096, help="tokens of the text (default %(default)s)")
    sub.add_argument("--skip", type=_at_least(0), default=512, help="first positions of a window that are not scored")
    sub.add_argument("--n-ubatch", type=_at_least(1), default=512, help=UBATCH)
    text = "file for the results; a task's answers are kept beside it, and a run that was stopped continues there"
    sub.add_argument("--json", help=text)
    _task_options(sub)
    sub = commands.add_parser("plot", help=PLOT_TEXT, description=PLOT_TEXT)
    sub.set_defaults(function=run_plot)
    sub.add_argument("results", nargs="+", help="JSON files of evaluate --text or calibrate --json")
    sub.add_argument("--out", required=True, metavar="FILE.png", help="picture to write")
    text = "prompt and decode speed of KV cache types side by side"
    sub = command("bench", run_bench, text, n_ctx=None, optional=True)
    sub.add_argument("--shape", choices=tuple(SHAPES), help="time a model with random weights of this shape instead")
    sub.add_argument("--layers", type=_at_least(1), help="layers of that model (default: as many as the real one)")
    sub.add_argument(
        "--depths", default="0,4096,16384,32768", help="tokens in the cache beforehand (default %(default)s)"
    )
    sub.add_argument("--kv-types", default="f16,q8_0,q4_0,xquant,xquant-small,xquant-tiny", help=f"any of {names}")
    sub.add_argument("--rounds", type=_at_least(1), default=3)
    sub.add_argument("--n-prompt", type=_at_least(1), default=256, help="prompt tokens timed (default %(default)s)")
    sub.add_argument("--n-decode", type=_at_least(1), default=16, help="decoded tokens timed (default %(default)s)")
    sub.add_argument("--n-gpu-layers", type=_at_least(-1), default=0, help="-1: all (default %(default)s)")
    sub.add_argument("--json", help="file for the results")
    # its own options are those of llama_cpp's server, which is an extra: serve parses them
    text = "OpenAI-compatible server; options as python -m llama_cpp.server, --kv-type and --kv-plan"
    commands.add_parser("serve", help=text, add_help=False).set_defaults(function=run_serve)
    return top


def _task_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--task", choices=list(TASKS), help="answers to questions instead of a text")
    sub.add_argument("--data", help="truthfulqa: its CSV; longbench: the JSON lines of multi_news")
    sub.add_argument("--limit", type=_at_least(1), help="truthfulqa, longbench: ask the first items only")
    sub.add_argument("--max-tokens", type=_at_least(1), help="longbench: tokens of a summary (default 512)")
    text = "passkey: tokens of prompt and answer, with commas (default 1024,2048,4096)"
    sub.add_argument("--lengths", type=_list_of(_at_least(1)), help=text)
    text = "passkey: where the key stands, 0 first to 1 last, with commas (default 0,0.25,0.5,0.75,1)"
    sub.add_argument("--depths", type=_list_of(float), help=text)
    sub.add_argument("--repeats", type=_at_least(1), help="passkey: keys for each length and depth (default 1)")
    sub.add_argument("--seed", type=_at_least(0), help="passkey: another seed gives other texts (default 0)")


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
    except (ValueError, OSError, ImportError) as error:
        print(f"xquant-gguf: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
