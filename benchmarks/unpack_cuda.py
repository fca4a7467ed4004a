"""Speed of unpacking pages to F16 for prompts alone, against a copy of as many bytes.

usage: unpack_cuda.py [--tokens 32768,131072] [--layers k4v2,k2v1] [--rounds 7]

Llama-3-8B's shape (8 KV heads, width 128), all pages sealed but the last two; keys and values of one layer.  Medians of
replays of a graph of 20 launches that rotate over three layers.  The floor is the bytes read and written over the
bandwidth of a device-to-device copy, measured in the same run.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from attention_cuda import COPIES, Shape, copy_bandwidth, layer_of, milliseconds, sealed_layer
from support import gpu
from support.devices import Buffer
from support.storage import SEALED
from xquant_gguf import native
from xquant_gguf.cli.text import table
from xquant_gguf.plan import PAGE

SHAPE = Shape.of("128/4*8")
HEADS, WIDTH = SHAPE.heads, SHAPE.d


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="32768,131072")
    parser.add_argument("--layers", default="k4v2,k2v1")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    rng, on = np.random.default_rng(0), gpu.Cuda()
    bandwidth = copy_bandwidth(on)
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    lines = [["tokens", "layer", "keys, ms", "values, ms", "floor, ms", "share"]]
    for n_tokens in map(int, args.tokens.split(",")):
        n_pages = n_tokens // PAGE
        states = np.full(n_pages, SEALED, np.int32)
        states[-2:] = 0, 1
        slots, rows = Buffer(on, states), Buffer(on, HEADS * n_tokens * WIDTH * 2)
        for name in args.layers.split(","):
            layers = [sealed_layer(on, SHAPE, layer_of(name), n_pages, rng) for _ in range(COPIES)]
            ms = []
            for is_k in (1, 0):
                a = native.load()[0].new("xq_unpack_args *")
                a.table, a.rows = slots.pointer("int32_t"), rows.pointer("uint16_t")
                a.n_streams, a.n_kv_pages, a.is_k, a.n_heads = 1, n_pages, is_k, HEADS

                def unpack(i: int, stream: int, a: Any = a, layers: Any = layers) -> None:
                    on.enqueue("unpack", layers[i % COPIES].c, a, stream)

                ms.append(milliseconds(unpack, args.rounds))
            n_bytes = HEADS * n_pages * int(layers[0].layout.bytes) + 4 * HEADS * n_tokens * WIDTH
            floor = n_bytes / bandwidth * 1e3
            lines.append([str(n_tokens), name, *(f"{x:.4f}" for x in ms), f"{floor:.4f}", f"{floor / sum(ms):.0%}"])
    print(table(lines))


if __name__ == "__main__":
    main()
