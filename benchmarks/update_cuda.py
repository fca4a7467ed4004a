"""What a layer's updates take on a GPU: a micro-batch's rows, and the pages that get smaller behind its attention.

usage: update_cuda.py [--shape 128/4*8] [--layers k4v2,k2v1] [--rounds 7]

Microseconds, medians of replays of a graph of 20 launches that rotate over three layers.  rows: 512 tokens, to a stage
of five pages.  codes: four pages of the stage become codes.  bytes: the page of the slot becomes bytes, and the slot is
refilled.  bytes to codes: one page.  unpack: keys and values of six pages as F16, as a prompt's attention reads them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from attention_cuda import COPIES, Shape, layer_of, milliseconds
from support import gpu
from support.devices import Buffer
from support.pages_of_codes import random_rows
from support.storage import BYTES, NONE, SEALED, Move, Storage
from xquant_gguf import native
from xquant_gguf.cli.text import table
from xquant_gguf.plan import PAGE

N_PAGES, N_STAGED, N_BYTES, N_TOKENS = 16, 5, 3, 512


def updates(
    on: gpu.Cuda, shape: Shape, layers: list[Storage], rng: np.random.Generator
) -> dict[str, Callable[..., Any]]:
    """Each kind of update of layer number, on a stream."""
    new = native.load()[0].new
    keep = [
        Buffer(on, rng.standard_normal((N_TOKENS, shape.heads, width), dtype=np.float32))
        for width in (shape.d, max(shape.e, 1))
    ]
    rows = Buffer(on, np.arange(PAGE, PAGE + N_TOKENS, dtype=np.int32))  # behind the slot: the stage
    bad = Buffer(on, np.zeros(1, np.uint64))

    def call(args: Any, *kept: Any) -> Callable[[int, int], None]:
        args.n_nonfinite = bad.pointer("uint64_t")

        def run(number: int, stream: int, keep: Any = (keep, rows, kept)) -> None:
            on.enqueue("update", layers[number % len(layers)].c, args, stream)

        return run

    def seal(*moves: Move) -> Callable[[int, int], None]:
        a, words = new("xq_update_args *"), Buffer(on, np.array([move.words() for move in moves], np.int32))
        a.seals, a.n_seals = words.pointer("int32_t"), len(moves)
        return call(a, words)

    a = new("xq_update_args *")
    a.rows, a.n_tokens = rows.pointer("int32_t"), N_TOKENS
    a.k_cur, a.v_cur = keep[0].pointer("float"), keep[1].pointer("float")
    a.k_head_stride, a.k_token_stride = 4 * shape.d, 4 * shape.d * shape.heads
    a.v_head_stride, a.v_token_stride = 4 * shape.e, 4 * shape.e * shape.heads
    found = {"rows": call(a), "codes": seal(*(Move(page, page) for page in range(1, 5)))}
    found["bytes"] = seal(Move(6, 0, refill=2, small=BYTES))
    found["bytes to codes"] = seal(Move(7, BYTES - 1))

    states = np.full(N_PAGES, SEALED, np.int32)
    states[:6] = 0, BYTES, *range(1, 5)
    slots, out = Buffer(on, states), Buffer(on, shape.heads * N_PAGES * PAGE * max(shape.d, shape.e) * 2)
    for is_k, name in ((1, "unpack keys"), (0, "unpack values")):
        u = new("xq_unpack_args *")
        u.table, u.rows = slots.pointer("int32_t"), out.pointer("uint16_t")
        u.n_streams, u.n_kv_pages, u.is_k, u.n_heads = 1, 6, is_k, shape.heads

        def unpack(number: int, stream: int, u: Any = u, keep: Any = (slots, out)) -> None:
            on.enqueue("unpack", layers[number % len(layers)].c, u, stream)

        found[name] = unpack
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=Shape.of, default=Shape.of("128/4*8"))
    parser.add_argument("--layers", default="k4v2,k2v1")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    rng, on, shape = np.random.default_rng(0), gpu.Cuda(), args.shape
    lines: list[list[str]] = []
    for name in args.layers.split(","):
        rows = random_rows(rng, 1, shape.heads, 1 + N_STAGED, shape.d, shape.e)
        layers = [Storage(on, layer_of(name), rows, N_PAGES, staged=N_STAGED, n_bytes=N_BYTES) for _ in range(COPIES)]
        for layer in layers:  # bytes that were made of rows
            layer.update([Move(6, 0, refill=NONE, small=BYTES - n) for n in range(N_BYTES)])
        found = updates(on, shape, layers, rng)
        lines = lines or [["layer", *found]]
        lines.append([name, *(f"{milliseconds(work, args.rounds) * 1e3:.1f}" for work in found.values())])
    print(table(lines))


if __name__ == "__main__":
    main()
