"""Speed of attention over unpacked rows, which prompts take on GPUs of compute capability 9.0.

usage: prompt_cuda.py [--cells 512,8192,32768,131072] [--tokens 512,64,16] [--shapes 128/4*8,...] [--rounds 7]

A shape: width / query heads of a KV head * KV heads.  Every token sees all cells but the later ones of its prompt.
Medians of replays of a graph of 20 launches over three layers' rows; beside it the TFLOP/s of its products.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from attention_cuda import COPIES, Shape, milliseconds
from support import gpu
from support.devices import Buffer, Refused
from xquant_gguf import native
from xquant_gguf.cli.text import table
from xquant_gguf.plan import PAGE


def arguments(on: gpu.Cuda, shape: Shape, n_cells: int, n_tokens: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """Arguments of attend_rows for each layer, and what must live as long as they."""
    ffi, _ = native.load()
    n_head, row = shape.heads * shape.n_rep, shape.heads * shape.d
    mask = np.zeros((n_tokens, n_cells), np.float16)
    mask[:, n_cells - n_tokens :][np.triu_indices(n_tokens, 1)] = -np.inf
    chunk = rng.standard_normal((PAGE, row), np.float32).astype(np.float16)
    rows = np.tile(chunk, (n_cells // PAGE, 1))
    q = Buffer(on, rng.standard_normal((n_tokens, n_head, shape.d), np.float32))
    masks, out = Buffer(on, mask), Buffer(on, 4 * n_tokens * n_head * shape.d)
    kept: list[Any] = [q, masks, out]
    calls = []
    for _ in range(COPIES):
        k, v = Buffer(on, rows), Buffer(on, rows)
        a = ffi.new("xq_rows_args *")
        a.q, a.out, a.mask = q.pointer("float"), out.pointer("float"), masks.pointer("uint16_t")
        a.k, a.v = k.pointer("uint16_t"), v.pointer("uint16_t")
        a.q_head_stride, a.q_token_stride = 4 * shape.d, 4 * shape.d * n_head
        a.q_stream_stride, a.mask_token_stride, a.mask_stream_stride = n_tokens * 4 * shape.d * n_head, 2 * n_cells, 0
        a.width, a.n_head, a.n_head_kv, a.n_tokens, a.n_streams = shape.d, n_head, shape.heads, n_tokens, 1
        a.n_kv_pages, a.scale = n_cells // PAGE, shape.d**-0.5
        size = int(on.backend.rows_scratch(a))
        if size < 0:
            raise SystemExit("this GPU has no kernel for attention over rows")
        scratch = Buffer(on, max(size, 16))
        a.scratch = ffi.cast("void *", scratch.at)
        kept += [k, v, scratch]
        calls.append(a)
    return calls, kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="512,8192,32768,131072")
    parser.add_argument("--tokens", default="512,64,16")
    parser.add_argument("--shapes", default="128/4*8")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    ffi, _ = native.load()
    rng, on = np.random.default_rng(0), gpu.Cuda()
    lines = [["shape", "tokens", "cells", "ms", "TFLOP/s"]]
    for name in args.shapes.split(","):
        shape = Shape.of(name)
        for n_tokens in map(int, args.tokens.split(",")):
            for n_cells in map(int, args.cells.split(",")):
                calls, kept = arguments(on, shape, n_cells, n_tokens, rng)

                def attend(i: int, stream: int, calls: Any = calls) -> None:
                    at = ffi.new("xq_exec *", {"nth": 1, "cuda_stream": ffi.cast("void *", stream)})
                    if on.backend.attend_rows(calls[i % COPIES], at) != 0:
                        raise Refused(on.error())

                ms = milliseconds(attend, args.rounds)
                flop = 4.0 * n_tokens * n_cells * shape.d * shape.heads * shape.n_rep
                lines.append([name, str(n_tokens), str(n_cells), f"{ms:.4f}", f"{flop / ms / 1e9:.0f}"])
                del kept
    print(table(lines))


if __name__ == "__main__":
    main()
