"""Decode speed with and without threads that wait between tokens (xquant_gguf.threads), in a build without OpenMP.

usage: waiting_threads.py [--shapes smollm2-135m,qwen2.5-0.5b] [--weights q8_0] [--threads 2,4,8,16] [--rounds 4]

Models of these shapes with random weights; an xquant cache, a prompt of 64 tokens, then 48 one by one, in turns.
Printed are medians.  Without OpenMP: a wheel of `make wheels`, or -DGGML_OPENMP=OFF in CMAKE_ARGS.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from xquant_gguf import threads
from xquant_gguf.bench import Runner
from xquant_gguf.cli.text import table
from xquant_gguf.synthetic import SHAPES, WEIGHTS, write

N_PROMPT, N_DECODE = 64, 48


def runner(model: Path, n_threads: int, waiting: bool) -> Runner:
    """A context whose threads wait, or not."""
    needed = threads.are_needed
    if not waiting:
        threads.are_needed = lambda: False
    try:
        return Runner(str(model), "xquant", 2 * (N_PROMPT + N_DECODE), n_threads=n_threads, n_threads_batch=n_threads)
    finally:
        threads.are_needed = needed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", default="smollm2-135m,qwen2.5-0.5b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--weights", choices=tuple(WEIGHTS), default="q8_0")
    parser.add_argument("--threads", default="2,4,8,16")
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    if not threads.are_needed():
        parser.error("this build has OpenMP, whose threads wait")
    lines = [["shape", "threads", "tokens/s without", "with", "/"]]
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes.split(","):
            model = write(Path(folder) / f"{shape}.gguf", shape, 0, args.weights)
            for n in map(int, args.threads.split(",")):
                both = [runner(model, n, waiting) for waiting in (False, True)]
                speeds = [[each.measure(N_PROMPT, N_DECODE)[1] for each in both] for _ in range(args.rounds)]
                without, waiting = (statistics.median(column) for column in zip(*speeds, strict=True))
                for each in both:
                    each.close()
                lines.append([shape, str(n), f"{without:.1f}", f"{waiting:.1f}", f"{waiting / without:.2f}"])
    print(table(lines))


if __name__ == "__main__":
    main()
