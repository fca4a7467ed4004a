"""Speed of the five verbs of the CPU backend alone, one layer, over threads.

usage: PYTHONPATH=tests python benchmarks/verbs.py [--tokens 16384] [--kernels avx2,scalar] [--threads 1,2]
                                                   [--seconds 1]

ns: per value of keys and values that a call reads or writes (attend: per cached token and KV head), the median and the
least.  Threads are Python's, which meet before and after each call: some 50 microseconds of a call are theirs.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from support.devices import Cpu
from support.pages_of_codes import Content, V, random_rows
from support.storage import SEALED, Move, Storage
from xquant_gguf import codec, native
from xquant_gguf.cli.text import table
from xquant_gguf.plan import PAGE, Layer, Side

HEADS, QUERY_HEADS, WIDTH = 8, 32, 128  # Llama-3-8B's
MOVED = 16  # pages that are sealed, unsealed, unpacked or shifted at once


class Timed(Cpu):
    """Calls a verb again and again, for each number of threads; found: median and least seconds of the last verb."""

    def __init__(self, kernels: str, threads: list[int], seconds: float) -> None:
        super().__init__(kernels)
        self.threads, self.seconds = threads, seconds
        self.found: dict[int, tuple[float, float]] = {}

    def verb(self, verb: str, store: Any, args: Any, n_threads: int = 1) -> None:
        self.call(verb, store, args, n_threads)
        with codec.force_kernels(self.kernels):
            self.found = {n: self._times(getattr(self.backend, verb), store, args, n) for n in self.threads}

    def _times(self, function: Any, store: Any, args: Any, n_threads: int) -> tuple[float, float]:
        barrier, times, running = threading.Barrier(n_threads), list[float](), [True]
        end = time.perf_counter() + self.seconds

        def run(ith: int) -> None:
            own = native.load()[0].new("xq_exec *", {"ith": ith, "nth": n_threads})
            while True:
                barrier.wait()
                if not running[0]:
                    return
                start = time.perf_counter()
                function(store, args, own)
                barrier.wait()
                if ith == 0:
                    times.append(time.perf_counter() - start)
                    running[0] = time.perf_counter() < end

        others = [threading.Thread(target=run, args=(ith,)) for ith in range(1, n_threads)]
        for thread in others:
            thread.start()
        run(0)
        for thread in others:
            thread.join()
        return statistics.median(times), min(times)


def calls(on: Timed, n_pages: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """What is timed, and the values, or cached tokens times heads, that it works on."""
    rng = np.random.default_rng(0)
    layer = Layer(Side(4, 128), V)
    storage: Storage = Content(layer, random_rows(rng, 1, HEADS, MOVED, WIDTH)).put(on, n_pages)
    moves = [Move(page, page) for page in range(MOVED)]
    sealed = [Move(page, SEALED) for page in range(MOVED)]
    keys = rng.standard_normal((MOVED, PAGE, HEADS, WIDTH), np.float32)
    new = keys.reshape(-1, HEADS, WIDTH)
    q = rng.standard_normal((1, 1, QUERY_HEADS, WIDTH), np.float32)
    side = MOVED * PAGE * HEADS * WIDTH
    return {
        "update: rows": (lambda: storage.write(np.arange(len(new), dtype=np.int32), (new, new)), 2 * side),
        "update: one row": (lambda: storage.write(np.zeros(1, np.int32), (new[:1], new[:1])), 2 * HEADS * WIDTH),
        "update: seals": (lambda: storage.update(moves), 2 * side),
        "update: unseals": (lambda: storage.update(unseals=moves), 2 * side),
        "attend: sealed": (lambda: storage.attend(q, [[SEALED] * n_pages], n_parts=4), n_pages * PAGE * HEADS),
        "attend: open": (lambda: storage.attend(q, [list(range(MOVED))], n_parts=4), MOVED * PAGE * HEADS),
        "unpack: keys": (lambda: storage.unpack([[SEALED] * MOVED], True), side),
        "unpack: values": (lambda: storage.unpack([[SEALED] * MOVED], False), side),
        "read_keys": (lambda: storage.read_keys(sealed), side),
        "write_keys": (lambda: storage.write_keys(sealed, keys), side),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384, help="that attend reads (default %(default)s)")
    parser.add_argument("--kernels", default=codec.kernels(), help="default %(default)s")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each (default %(default)s)")
    args = parser.parse_args()
    if args.tokens < MOVED * PAGE or args.tokens % PAGE != 0:
        parser.error(f"--tokens is {args.tokens}, must be a multiple of {PAGE} from {MOVED * PAGE} on")
    lines = [["verb", "kernels", "threads", "ms", "ns", "best ns"]]
    for kernels in args.kernels.split(","):
        on = Timed(kernels, list(map(int, args.threads.split(","))), args.seconds)
        for name, (call, n) in calls(on, args.tokens // PAGE).items():
            call()
            for threads, (median, best) in on.found.items():
                numbers = f"{median * 1e3:.3f}", f"{median / n * 1e9:.3f}", f"{best / n * 1e9:.3f}"
                lines.append([name, kernels, str(threads), *numbers])
    print(table(lines))


if __name__ == "__main__":
    main()
