"""The command bench."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from xquant_gguf import codec, fork
from xquant_gguf.bench import bench
from xquant_gguf.cli.options import Commands, add_command, at_least, kv_types
from xquant_gguf.cli.text import table
from xquant_gguf.synthetic import SHAPES, WEIGHTS
from xquant_gguf.synthetic import write as write_shape


def _depth(text: str) -> int:
    try:
        return at_least(0)(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--depths {error}") from error


def run(args: argparse.Namespace) -> int:
    if (args.model is None) == (args.shape is None):
        raise ValueError("name a model, or --shape, but not both")
    for name in ("layers", "weights"):
        if (value := getattr(args, name)) and not args.shape:
            raise ValueError(f"--{name} is {value}: it belongs to --shape")
    depths = [_depth(text) for text in args.depths.split(",")]
    kv_types = args.kv_types.split(",")
    memory = args.memory and args.memory * 2**30
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if args.shape:
            model = write_shape(Path(folder) / "random.gguf", args.shape, args.layers or 0, args.weights or "f16")
        with tqdm(total=len(depths) * len(kv_types) * (args.rounds + 2), unit="step", file=sys.stderr) as bar:
            rows = bench(
                str(model), kv_types, depths, rounds=args.rounds, n_prompt=args.n_prompt, n_decode=args.n_decode,
                parallel=args.parallel, step=args.step, memory=memory, n_gpu_layers=args.n_gpu_layers,
                done=lambda _: bar.update(), n_threads=args.threads,
            )  # fmt: skip
    base = {row.depth: row for row in rows if row.kv_type == kv_types[0]}
    first = f"/ {kv_types[0]}"
    gpu = bool(args.n_gpu_layers)
    lines = [["depth", "KV cache", "prompt t/s", first, "decode t/s", first, "MiB"]]
    lines[0] += (["GB/s"] if gpu else []) + (["sequences"] if memory else [])
    for r in rows:
        b = base[r.depth]
        speeds = [f"{r.prompt_tps:.1f}", f"{r.prompt_tps / b.prompt_tps:.2f}"]
        speeds += [f"{r.decode_tps:.1f}", f"{r.decode_tps / b.decode_tps:.2f}"]
        step = [f"{r.step_bytes / r.step_s / 1e9:.0f}"] if gpu else []
        sequences = [str(r.parallel)] if memory else []
        lines.append([str(r.depth), r.kv_type, *speeds, f"{r.kv_bytes / 2**20:.1f}", *step, *sequences])
    print(table(lines))
    kernels = {"kernels": codec.kernels(), "llama_kernels": fork.cpu_variant()}
    print(f"kernels {kernels['kernels']}, llama.cpp's {kernels['llama_kernels']}")
    if gpu:
        print("GB/s: weights and cache that a decode step reads; benchmarks/gpu_memory.py tells what the GPU can")
    if args.json:
        names = ("rounds", "n_prompt", "n_decode", "parallel", "memory", "step", "n_gpu_layers", "layers", "weights")
        settings = {key: getattr(args, key) for key in names}
        settings["model"] = args.shape or Path(args.model).name
        out = {"results": [asdict(row) for row in rows], **settings, **kernels}
        Path(args.json).write_text(json.dumps(out, indent=2) + "\n")
    return 0


def add(commands: Commands) -> None:
    """Declares it."""
    text = "prompt and decode speed of KV cache types side by side"
    sub = add_command(commands, "bench", run, text, optional=True)
    sub.add_argument("--shape", choices=tuple(SHAPES), help="time a model with random weights of this shape instead")
    sub.add_argument("--layers", type=at_least(1), help="layers of that model (default: as many as the real one)")
    sub.add_argument("--weights", choices=tuple(WEIGHTS), help="type of its weights (default f16)")
    sub.add_argument(
        "--depths", default="0,4096,16384,32768", help="tokens in the cache beforehand (default %(default)s)"
    )
    sub.add_argument("--kv-types", default="f16,q8_0,q4_0,xquant,xquant-small,xquant-tiny", help=f"any of {kv_types()}")
    sub.add_argument("--rounds", type=at_least(1), default=3)
    sub.add_argument("--n-prompt", type=at_least(1), default=256, help="prompt tokens timed (default %(default)s)")
    sub.add_argument("--n-decode", type=at_least(1), default=16, help="decode steps timed (default %(default)s)")
    sub.add_argument("--step", type=at_least(1), default=1, help="tokens of a sequence in a step (default %(default)s)")
    sub.add_argument("--parallel", type=at_least(1), default=1, help="sequences decoded together (default %(default)s)")
    text = "GiB: of each type as many sequences as fit beside the weights, a type at a time (and compute buffers)"
    sub.add_argument("--memory", type=at_least(1), help=text)
    sub.add_argument("--n-gpu-layers", type=at_least(-1), default=0, help="-1: all (default %(default)s)")
    sub.add_argument("--json", help="file for the results")
