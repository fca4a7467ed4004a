"""The command evaluate."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xquant_gguf.cli.options import UBATCH, Commands, add_command, at_least, kv_types, list_of
from xquant_gguf.cli.text import table, write_json
from xquant_gguf.evaluate import evaluate
from xquant_gguf.tasks import TASKS, task_of
from xquant_gguf.tasks import run as run_items

TASK_TEXT = "quality of KV cache types: perplexity and KL divergence from F16 on a text, or answers to a task"
TASK_OPTIONS = ("data", "limit", "max_tokens", "lengths", "depths", "needles", "repeats", "seed", "run_code", "shots")


def run(args: argparse.Namespace) -> int:
    if args.task:
        return run_task(args)
    if not args.text:
        raise ValueError("name a text with --text FILE, or a task with --task")
    text = Path(args.text).read_text(errors="replace")
    kv_types = args.kv_types.split(",")
    out = evaluate(
        args.model, text, kv_types, n_tokens=args.tokens, n_ctx=args.n_ctx, skip=args.skip, n_ubatch=args.n_ubatch,
        n_threads=args.threads, n_gpu_layers=args.n_gpu_layers,
    )  # fmt: skip
    rows = [["KV cache", "true bits", "equivalent", "MiB", "PPL", "KLD", "99%", "99.9%", "largest", "top-1 %"]]
    for r in out["results"]:
        numbers = [f"{r['true_bits']:.2f}", f"{r['equivalent_bits']:.2f}", f"{r['kv_bytes'] / 2**20:.1f}"]
        tail = [f"{r[name]:.3f}" for name in ("kld_p99", "kld_p999", "kld_max")]
        numbers += [f"{r['ppl']:.3f}", f"{r['kld']:.4f}", *tail, f"{100 * r['top1']:.1f}"]
        rows.append([r["kv_type"], *numbers])
    print(table(rows))
    if len(out["results"][0]["by_position"]) > 1:
        print(f"\n{table(_by_position(out['results']))}")
    if args.json:
        write_json(args.json, out)
    return 0


def _by_position(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Mean KL divergence and share of same tokens, by where in its window a token stands."""
    rows = [["KLD, top-1 %", *(f"{r['first']} to {r['last']}" for r in results[0]["by_position"])]]
    for result in results:
        rows.append([result["kv_type"], *(f"{r['kld']:.4f} {100 * r['top1']:5.1f}" for r in result["by_position"])])
    return rows


def run_task(args: argparse.Namespace) -> int:
    if args.text:
        raise ValueError("--text is no option of a task: --data FILE names its questions")
    task = task_of(args.task, {name: getattr(args, name) for name in TASK_OPTIONS})
    beside = Path(args.json).with_suffix(".items.jsonl") if args.json else None
    out = run_items(
        args.model, task, args.kv_types.split(","), n_ctx=args.n_ctx, n_ubatch=args.n_ubatch, n_threads=args.threads,
        n_gpu_layers=args.n_gpu_layers, answers_path=beside,
    )  # fmt: skip
    near = [name for name in out["results"][0] if name.endswith("_to_f16")]
    paired = [name for name in ("worse", "better", "p") if name in out["results"][0]]
    rows = [
        ["KV cache", "true bits", "items", *task.metrics, "+-", "same as f16 %", *near, *paired, "tokens", "in codes"]
    ]
    for r in out["results"]:
        numbers = [f"{r['true_bits']:.2f}", str(r["n"]), *(f"{r[m]:.3f}" for m in task.metrics)]
        numbers += [f"{r[task.metrics[0] + '_stderr']:.3f}"]
        numbers += [f"{100 * r['same_as_f16']:.1f}" if "same_as_f16" in r else "-"]
        numbers += [f"{r[name]:.3f}" for name in near]
        numbers += [f"{r[name]:.3g}" for name in paired]
        rows.append([r["kv_type"], *numbers, f"{r['tokens']:.0f}", f"{r['tokens_in_codes']:.0f}"])
    print(table(rows))
    if details := task.rows(out):
        print(f"\n{table(details)}")
    if args.json:
        write_json(args.json, out)
    return 0


def _task_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--task", choices=list(TASKS), help="answers to questions instead of a text")
    text = "truthfulqa: its CSV; longbench: the JSON lines of multi_news; humaneval: its JSON lines, also as .gz; "
    sub.add_argument(
        "--data",
        help=f"{text}harness: name or YAML file of a task; generate: JSON "
        "lines with a prompt (default: built-in prompts)",
    )
    text = "truthfulqa, longbench, humaneval, harness, generate: ask the first items only"
    sub.add_argument("--limit", type=at_least(1), help=text)
    text = "tokens of an answer; longbench: default 512; humaneval: 384; generate: 1024"
    sub.add_argument("--max-tokens", type=at_least(1), help=text)
    text = "harness: answered questions in front of each (default: as the task says)"
    sub.add_argument("--shots", type=at_least(0), help=text)
    text = "passkey, needles: tokens of prompt and answer, with commas (default 1024,2048,4096; 4096,8192,16384)"
    sub.add_argument("--lengths", type=list_of(at_least(1)), help=text)
    text = "passkey: where the key stands, 0 first to 1 last, with commas (default 0,0.25,0.5,0.75,1)"
    sub.add_argument("--depths", type=list_of(float), help=text)
    sub.add_argument("--needles", type=at_least(1), help="needles: numbers that are hidden in each text (default 8)")
    text = "passkey: keys for each length and depth; needles: texts for each length (default 1)"
    sub.add_argument("--repeats", type=at_least(1), help=text)
    sub.add_argument("--seed", type=at_least(0), help="passkey, needles: another seed gives other texts (default 0)")
    text = "humaneval: run the code that the model writes, in a process with limits (docs/usage.md says which)"
    sub.add_argument("--run-code", action="store_const", const=True, help=text)


def add(commands: Commands) -> None:
    """Declares it."""
    sub = add_command(commands, "evaluate", run, TASK_TEXT, n_ctx=4096)
    sub.add_argument("--text", help="text file")
    sub.add_argument("--kv-types", default="f16,q8_0,q4_0,xquant,xquant-small,xquant-tiny", help=f"any of {kv_types()}")
    sub.add_argument("--tokens", type=at_least(2), default=4096, help="tokens of the text (default %(default)s)")
    sub.add_argument("--skip", type=at_least(0), default=512, help="first positions of a window that are not scored")
    sub.add_argument("--n-ubatch", type=at_least(1), default=512, help=UBATCH)
    text = "layers on the GPU; -1: all (default %(default)s)"
    sub.add_argument("--n-gpu-layers", type=at_least(-1), default=0, help=text)
    text = "file for the results; a task's answers are kept beside it, and a run that was stopped continues there"
    sub.add_argument("--json", help=text)
    _task_options(sub)
