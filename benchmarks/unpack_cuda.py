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

from attention_cuda import COPIES, HEADS, WIDTH, copy_bandwidth, gpu, milliseconds, sealed_layer, table
from xquant_gguf.plan import PAGE, Layer, Side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="32768,131072")
    parser.add_argument("--layers", default="k4v2,k2v1")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    rng, ffi = np.random.default_rng(0), gpu.load()[0]
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    lines = [["tokens", "layer", "keys, ms", "values, ms", "floor, ms", "share"]]
    for n_tokens in map(int, args.tokens.split(",")):
        n_pages = n_tokens // PAGE
        states = np.full(n_pages, gpu.SEALED, np.int32)
        states[-2:] = 0, 1
        keep = [gpu.Buffer(states), gpu.Buffer(np.zeros(1, np.int32)), gpu.Buffer(HEADS * n_tokens * WIDTH * 2)]
        for name in args.layers.split(","):
            v = Side(int(name[3]), 0, "lloyd", "log8", rotate=True, eta=0.09)
            layers = [sealed_layer(Layer(Side(int(name[1]), PAGE), v), n_pages, rng) for _ in range(COPIES)]
            ms = []
            for is_k in (1, 0):
                a = ffi.new("xq_cuda_unpack_args *")
                a.table, a.first_stream = keep[0].pointer("int32_t"), keep[1].pointer("int32_t")
                a.n_streams, a.n_kv_pages, a.is_k, a.n_heads = 1, n_pages, is_k, HEADS
                a.rows = keep[2].pointer("uint16_t")

                def run(i: int, stream: Any, a: Any = a, layers: Any = layers) -> None:
                    gpu.call("xq_cuda_unpack", layers[i % COPIES].c, a, stream)

                ms.append(milliseconds(run, args.rounds))
            n_bytes = HEADS * n_pages * layers[0].layout.bytes + 4 * HEADS * n_tokens * WIDTH
            floor = n_bytes / bandwidth * 1e3
            lines.append([str(n_tokens), name, *(f"{x:.4f}" for x in ms), f"{floor:.4f}", f"{floor / sum(ms):.0%}"])
    print(table(lines))


if __name__ == "__main__":
    main()
