"""Prompt and decode speed on CPUs beside other forks of llama.cpp, on one model with random weights.

usage: peers.py --peer NAME=FOLDER:TYPES [--peer ...] [--shape qwen2.5-1.5b] [--layers 8] [--weights f16]
                [--depths 128,4096,16384] [--threads 8] [--prompt-threads N] [--kv-types f16,xquant] [--rounds 2]
                [--build build/peers] [--json FILE]

A peer is the source of a fork of llama.cpp, a folder that you have: NAME=FOLDER:f16,q8_0,q8_KV/q8_0 with the types of
cache to time (K and V alike, or K/V).  Its llama-batched-bench is built for this machine (cmake, ninja).  All read the
same GGUF file and do the same: a prompt of as many tokens as a depth says, from an empty cache, in micro-batches of
512, then 64 tokens one by one.  They take turns, a process each time; printed is the best of the rounds, since a
machine's other work only slows, and each over the first of all rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from xquant_gguf.bench import Runner
from xquant_gguf.cli.text import table
from xquant_gguf.synthetic import SHAPES, WEIGHTS
from xquant_gguf.synthetic import write as write_shape

N_DECODE = 64
UBATCH = 512
Speeds = dict[int, tuple[float, float]]  # by depth: prompt and decode tokens/s


@dataclass(frozen=True)
class Peer:
    """A fork's source and the types of its cache that are timed."""

    name: str
    source: Path
    types: list[str]


def peer(text: str) -> Peer:
    """NAME=FOLDER:TYPE,TYPE"""
    name, _, rest = text.partition("=")
    folder, _, types = rest.rpartition(":")
    if not name or not types or not (Path(folder) / "CMakeLists.txt").is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER:TYPES with a FOLDER that has llama.cpp's source")
    return Peer(name, Path(folder), types.split(","))


def build(source: Path, folder: Path) -> Path:
    """The fork's llama-batched-bench, built if it is not there."""
    options = ["-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF"]
    off = [f"-DLLAMA_BUILD_{part}=OFF" for part in ("TESTS", "SERVER", "UI", "APP")] + ["-DLLAMA_USE_PREBUILT_UI=OFF"]
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        for command in (
            ["cmake", "-G", "Ninja", "-S", str(source), "-B", str(folder), *options, *off],
            ["ninja", "-C", str(folder), "llama-batched-bench"],
        ):
            if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode:
                raise SystemExit(f"{' '.join(command)} failed: see {log}")
    return folder / "bin" / "llama-batched-bench"


def time_peer(program: Path, model: Path, cache: str, depths: list[int], threads: int, prompt_threads: int) -> Speeds:
    """Runs it once; its table has a line for each depth: | PP | TG | B | N_KV | T_PP | S_PP | T_TG | S_TG | ..."""
    k, _, v = cache.partition("/")
    options = {
        "-m": model, "-t": threads, "-tb": prompt_threads, "-fa": "on", "-ctk": k, "-ctv": v or k,
        "-c": max(depths) + N_DECODE, "-ub": UBATCH, "-npp": ",".join(map(str, depths)), "-ntg": N_DECODE, "-npl": 1,
    }  # fmt: skip
    command = [str(program), *(str(part) for option in options.items() for part in option)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    speeds: Speeds = {}
    for line in (run.stdout + run.stderr).splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) >= 8 and cells[0].isdigit():
            speeds[int(cells[0])] = float(cells[5]), float(cells[7])
    if sorted(speeds) != sorted(depths):
        raise SystemExit(f"{' '.join(command)} ended with {run.returncode}:\n{(run.stdout + run.stderr)[-2000:]}")
    return speeds


def time_ours(model: Path, cache: str, depths: list[int], threads: int, prompt_threads: int) -> Speeds:
    """The same with our library, in this process."""
    n_ctx = max(depths) + N_DECODE + 64
    sizes = {"n_threads": threads, "n_threads_batch": prompt_threads, "n_batch": 2048, "n_ubatch": UBATCH}
    runner = Runner(str(model), cache, n_ctx, **sizes)
    try:
        return {depth: runner.measure(depth, N_DECODE) for depth in depths}
    finally:
        runner.close()


def turns(
    args: argparse.Namespace, programs: dict[str, Path], model: Path, depths: list[int], *threads: int
) -> Iterator[tuple[str, str, Speeds]]:
    """Everybody once, each type of cache."""
    for kv in args.kv_types.split(","):
        yield "ours", kv, time_ours(model, kv, depths, *threads)
    for p in args.peer:
        for kv in p.types:
            yield p.name, kv, time_peer(programs[p.name], model, kv, depths, *threads)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    parser.add_argument("--peer", type=peer, action="append", default=[])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen2.5-1.5b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--weights", choices=tuple(WEIGHTS), default="f16")
    parser.add_argument("--depths", default="128,4096,16384")
    parser.add_argument("--threads", default="8", help="with commas")
    parser.add_argument("--prompt-threads", type=int, help="default: as many as --threads")
    parser.add_argument("--kv-types", default="f16,xquant")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--build", type=Path, default=Path("build/peers"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    depths = [int(text) for text in args.depths.split(",")]
    programs = {p.name: build(p.source, args.build / p.name) for p in args.peer}
    best: dict[tuple[int, int, str, str], tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    with tempfile.TemporaryDirectory() as folder:
        model = write_shape(Path(folder) / "random.gguf", args.shape, args.layers, args.weights)
        for threads in (int(text) for text in args.threads.split(",")):
            both = threads, args.prompt_threads or threads
            for _ in range(args.rounds):
                for name, kv, speeds in turns(args, programs, model, depths, *both):
                    print(f"{name} {kv}: {speeds}", file=sys.stderr)
                    for depth, found in speeds.items():
                        key = depth, threads, name, kv
                        best[key] = max(best[key][0], found[0]), max(best[key][1], found[1])
    lines = [["threads", "tokens", "", "KV cache", "prompt t/s", "/ first", "decode t/s", "/ first"]]
    for (depth, threads, name, kv), (prompt, decode) in sorted(best.items(), key=lambda row: row[0][:2]):
        first = next(found for key, found in best.items() if key[:2] == (depth, threads))
        ratios = [f"{prompt:.1f}", f"{prompt / first[0]:.2f}", f"{decode:.1f}", f"{decode / first[1]:.2f}"]
        lines.append([str(threads), str(depth), name, kv, *ratios])
    print(table(lines))
    if args.json:
        names = ("tokens", "threads", "who", "kv_type", "prompt_tps", "decode_tps")
        args.json.write_text(json.dumps([dict(zip(names, (*k, *v), strict=True)) for k, v in best.items()], indent=1))


if __name__ == "__main__":
    main()
