"""Speed of the CUDA decode attention alone, against the time that its bytes need.

usage: attention_cuda.py [--tokens 131072,32768] [--layers k4v2,k3v2,k2v1] [--rounds 7] [--json FILE]

Llama-3-8B's shape (32 heads, 8 KV heads, width 128), one new token, window and pinned page open, all other pages
sealed.  Medians of replays of a graph of 20 launches that rotate over three layers, so that nothing
comes from the cache.  The floor is the bytes of the sealed pages over the bandwidth of a device-to-device copy,
measured in the same run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support import gpu
from support.devices import Buffer
from support.pages_of_codes import random_rows
from support.storage import SEALED, Storage
from xquant_gguf import native
from xquant_gguf.cli.text import table
from xquant_gguf.plan import PAGE, Layer, Side

HEADS, N_REP, WIDTH, PARTS, COPIES, LAUNCHES = 8, 4, 128, 16, 3, 20


def milliseconds(work: Callable[[int, int], None], rounds: int) -> float:
    """Median time of one call of work(number, stream), over rounds of LAUNCHES calls."""

    def launches(stream: int) -> None:
        for i in range(LAUNCHES):
            work(i, stream)

    graph = gpu.Graph(launches)
    graph.milliseconds()  # warms up
    return statistics.median(graph.milliseconds() for _ in range(rounds)) / LAUNCHES


def copy_bandwidth(on: gpu.Cuda) -> float:
    """Bytes read and written per second."""
    n = 1 << 28
    to, start = on.alloc(n), on.alloc(n)

    def copy(_: int, stream: int) -> None:
        addresses = ctypes.c_uint64(to), ctypes.c_uint64(start)
        gpu.check(gpu.driver().cuMemcpyDtoDAsync_v2(*addresses, ctypes.c_size_t(n), ctypes.c_void_p(stream)))

    out = 2 * n / milliseconds(copy, 5) * 1e3
    on.free(to)
    on.free(start)
    return out


def layer_of(name: str) -> Layer:
    """k4v2: keys of four bits, values of two."""
    return Layer(Side(int(name[1]), PAGE), replace(Side(int(name[3]), 0, "lloyd", "log8", rotate=True), eta=0.09))


def sealed_layer(on: gpu.Cuda, layer: Layer, n_pages: int, rng: np.random.Generator) -> Storage:
    """Random codes and plausible parameters in every page."""
    out = Storage(on, layer, random_rows(rng, 1, HEADS, 3, WIDTH), n_pages)
    blocks = rng.integers(0, 256, (HEADS * n_pages, out.layout.bytes), dtype=np.uint8)
    k_param, v_param = (out.part_at(name)[1] for name in "kv")
    scales = (rng.random((len(blocks), 2 * WIDTH), dtype=np.float32) * 0.2).astype(np.float16)
    blocks[:, k_param] = scales.view(np.uint8)
    blocks[:, v_param.start : v_param.start + PAGE] = rng.integers(120, 140, (len(blocks), PAGE))
    blocks[:, v_param.start + PAGE : v_param.stop] = rng.integers(-9, 9, (len(blocks), PAGE)).astype(np.int8)
    out.set_pages(blocks.reshape(1, HEADS, n_pages, -1))
    return out


def caller(
    on: gpu.Cuda, layers: list[Storage], n_pages: int, rng: np.random.Generator
) -> tuple[Callable[[int, int], None], list[Any]]:
    """One launch of attention on layer i modulo their number; and what must live as long."""
    ffi, lib = native.load()
    n_head = HEADS * N_REP
    states = np.full(n_pages, SEALED, np.int32)
    states[0], states[-2], states[-1] = 0, 1, 2
    a = ffi.new("xq_attend_args *")
    a.n_head, a.n_tokens, a.n_streams, a.n_kv_pages, a.n_parts = n_head, 1, 1, n_pages, min(PARTS, n_pages)
    a.scale, a.q_head_stride, a.q_token_stride = WIDTH**-0.5, 4 * WIDTH, 4 * WIDTH * n_head
    keep: list[Any] = [
        a,
        Buffer(on, rng.standard_normal((n_head, WIDTH), dtype=np.float32)),
        Buffer(on, states),
        Buffer(on, np.zeros(n_pages * PAGE, np.float16)),
        Buffer(on, 4 * int(lib.xq_attend_states(layers[0].c, a))),
        Buffer(on, n_head * WIDTH * 4),
        Buffer(on, np.zeros(HEADS, np.uint32)),
    ]
    a.q, a.table, a.mask = keep[1].pointer("float"), keep[2].pointer("int32_t"), keep[3].pointer("uint16_t")
    a.partial, a.out, a.arrivals = keep[4].pointer("float"), keep[5].pointer("float"), keep[6].pointer("uint32_t")
    return lambda i, stream: on.enqueue("attend", layers[i % len(layers)].c, a, stream), keep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="131072,32768")
    parser.add_argument("--layers", default="k4v2,k3v2,k2v1")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json")
    args = parser.parse_args()
    rng, on = np.random.default_rng(0), gpu.Cuda()
    bandwidth = copy_bandwidth(on)
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    rows: list[dict[str, Any]] = []
    for n_tokens in map(int, args.tokens.split(",")):
        for name in args.layers.split(","):
            n_pages = n_tokens // PAGE
            layers = [sealed_layer(on, layer_of(name), n_pages, rng) for _ in range(COPIES)]
            attend, _keep = caller(on, layers, n_pages, rng)
            ms = milliseconds(attend, args.rounds)
            n_bytes = HEADS * n_pages * int(layers[0].layout.bytes)
            floor = n_bytes / bandwidth * 1e3
            rows.append({"tokens": n_tokens, "layer": name, "ms": ms, "bytes": n_bytes, "floor_ms": floor})
    lines = [["tokens", "layer", "ms", "GB/s", "floor, ms", "share"]]
    for r in rows:
        speed, share = r["bytes"] / r["ms"] / 1e6, r["floor_ms"] / r["ms"]
        lines.append(
            [str(r["tokens"]), r["layer"], f"{r['ms']:.4f}", f"{speed:.0f}", f"{r['floor_ms']:.4f}", f"{share:.0%}"]
        )
    print(table(lines))
    if args.json:
        Path(args.json).write_text(json.dumps({"copy_bandwidth": bandwidth, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
