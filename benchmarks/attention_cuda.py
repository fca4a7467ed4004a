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
from xquant_gguf.cli.text import table
from xquant_gguf.plan import PAGE, Layer, Side

HEADS, N_REP, WIDTH, PARTS, COPIES, LAUNCHES = 8, 4, 128, 16, 3, 20


def milliseconds(work: Callable[[int, Any], None], rounds: int) -> float:
    """Median time of one call, over rounds of LAUNCHES calls."""

    def launches(stream: Any) -> None:
        for i in range(LAUNCHES):
            work(i, stream)

    graph = gpu.Graph(launches)
    graph.milliseconds()  # warms up
    return statistics.median(graph.milliseconds() for _ in range(rounds)) / LAUNCHES


def copy_bandwidth() -> float:
    """Bytes read and written per second."""
    size = 1 << 28
    to, start = gpu.Buffer(size), gpu.Buffer(size)
    ffi, _ = gpu.load()

    def copy(_: int, stream: Any) -> None:
        at = ctypes.c_void_p(int(ffi.cast("uintptr_t", stream)))
        n = ctypes.c_size_t(size)
        gpu.check(gpu.driver().cuMemcpyDtoDAsync_v2(ctypes.c_uint64(to.at), ctypes.c_uint64(start.at), n, at))

    return 2 * size / milliseconds(copy, 5) * 1e3


def sealed_layer(layer: Layer, n_pages: int, rng: np.random.Generator) -> gpu.DeviceLayer:
    """Random codes and plausible parameters in every page."""
    window = tuple(rng.standard_normal((HEADS, 3, PAGE, WIDTH), dtype=np.float32).astype(np.float16) for _ in "kv")
    out = gpu.DeviceLayer(layer, (window[0], window[1]), n_pages)
    at = out.layout
    blocks = rng.integers(0, 256, (HEADS * n_pages, at.bytes), dtype=np.uint8)
    k_param = (rng.random((len(blocks), 2, WIDTH), dtype=np.float32) * 0.2).astype(np.float16)
    blocks[:, at.k_param : at.k_param + 4 * WIDTH] = k_param.reshape(len(blocks), -1).view(np.uint8)
    blocks[:, at.v_param : at.v_param + PAGE] = rng.integers(120, 140, (len(blocks), PAGE))
    blocks[:, at.v_param + PAGE : at.v_param + 2 * PAGE] = rng.integers(-9, 9, (len(blocks), PAGE)).astype(np.int8)
    out.blocks.set(blocks)
    return out


def caller(layers: list[gpu.DeviceLayer], n_pages: int, rng: np.random.Generator) -> Callable[[int, Any], None]:
    """One launch of attention and merge on layer i modulo their number."""
    ffi, _ = gpu.load()
    n_head = HEADS * N_REP
    states = np.full(n_pages, gpu.SEALED, np.int32)
    states[0], states[-2], states[-1] = 0, 1, 2
    keep = [
        gpu.Buffer(rng.standard_normal((n_head, WIDTH), dtype=np.float32)),
        gpu.Buffer(states),
        gpu.Buffer(np.zeros(n_pages * PAGE, np.float16)),
        gpu.Buffer(np.zeros(1, np.int32)),
        gpu.Buffer(PARTS * n_head * (2 * WIDTH + 2) * 4),
        gpu.Buffer(n_head * WIDTH * 4),
        gpu.Buffer(np.zeros(HEADS, np.uint32)),
    ]
    a = ffi.new("xq_cuda_attend_args *")
    a.q, a.q_head_stride, a.q_token_stride = keep[0].pointer("float"), 4 * WIDTH, 4 * WIDTH * n_head
    a.table, a.mask, a.first_stream = (
        keep[1].pointer("int32_t"),
        keep[2].pointer("uint16_t"),
        keep[3].pointer("int32_t"),
    )
    a.n_head, a.n_tokens, a.n_streams, a.n_kv_pages, a.n_parts = n_head, 1, 1, n_pages, min(PARTS, n_pages)
    a.scale, a.partial, a.out = WIDTH**-0.5, keep[4].pointer("float"), keep[5].pointer("float")
    a.arrivals = keep[6].pointer("uint32_t")
    keep_args: list[Any] = [keep, a]

    def run(i: int, stream: Any) -> None:
        layer = layers[i % len(layers)].c
        assert keep_args
        gpu.call("xq_cuda_attend", layer, a, stream)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="131072,32768")
    parser.add_argument("--layers", default="k4v2,k3v2,k2v1")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    rows: list[dict[str, Any]] = []
    for n_tokens in map(int, args.tokens.split(",")):
        for name in args.layers.split(","):
            v = Side(int(name[3]), 0, "lloyd", "log8", rotate=True)
            layer = Layer(Side(int(name[1]), PAGE), replace(v, eta=0.09))
            n_pages = n_tokens // PAGE
            layers = [sealed_layer(layer, n_pages, rng) for _ in range(COPIES)]
            ms = milliseconds(caller(layers, n_pages, rng), args.rounds)
            n_bytes = HEADS * n_pages * layers[0].layout.bytes
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
