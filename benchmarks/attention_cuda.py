"""Speed of the CUDA decode attention alone, against the time that its bytes need, and beside llama.cpp's over F16.

usage: attention_cuda.py [--shapes 128/4,256/4,...] [--tokens 131072,32768] [--layers k4v2,k3v2,k2v1] [--rounds 7]
                         [--f16 0] [--json FILE]

A shape: width of keys, or KEYSxVALUES, / query heads to a KV head * KV heads: 256/16*4; with `latent` behind it, values
are channels of the keys.  128/4*8 is Llama-3-8B's.  One new token, window and pinned page open, all other pages sealed.
Medians of replays of a graph of 20 launches that rotate over three layers, so that nothing comes from the cache.  The
floor is the bytes of the sealed pages over the bandwidth of a device-to-device copy, measured in the same run.

f16: ggml_flash_attn_ext of llama.cpp's CUDA backend in the same run, where the build has it: milliseconds, and how many
times as long it takes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import op_cuda
from support import gpu
from support.devices import Buffer
from support.pages_of_codes import random_rows
from support.storage import SEALED, Storage
from xquant_gguf import native
from xquant_gguf.cli.text import table
from xquant_gguf.plan import PAGE, Layer, Side

COPIES, LAUNCHES = 3, 20
BLOCKS, TILE_ROWS = 132, 16  # blocks that keep a GPU busy; query rows of one
SHAPES = "128/4*8,256/4*8,256/16*4,512/8*4,576x512/16*1latent,64/4*8,80/4*8,96/4*8,192x128/4*8"


@dataclass(frozen=True)
class Shape:
    """One layer's attention: widths of keys and values, query heads to a KV head, KV heads."""

    d: int
    e: int
    n_rep: int
    heads: int
    latent: bool

    @staticmethod
    def of(text: str) -> Shape:
        found = re.fullmatch(r"(\d+)(?:x(\d+))?/(\d+)\*(\d+)(latent)?", text)
        if not found:
            raise ValueError(f"shape {text!r}, must be like 128/4*8, 192x128/4*8 or 576x512/16*1latent")
        d, e, n_rep, heads, latent = found.groups()
        return Shape(int(d), int(e or d), int(n_rep), int(heads), latent is not None)

    def names(self, layers: list[str]) -> list[str]:
        """Layers that differ: of a latent one the bits of values say nothing."""
        return list({name[:2]: name for name in reversed(layers)}.values())[::-1] if self.latent else layers

    @property
    def parts(self) -> int:
        """As many as the fork's blocks."""
        return max(BLOCKS // (self.heads * -(-self.n_rep // TILE_ROWS)), 1)


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


def sealed_layer(on: gpu.Cuda, shape: Shape, layer: Layer, n_pages: int, rng: np.random.Generator) -> Storage:
    """Random codes and plausible parameters in every page."""
    rows = random_rows(rng, 1, shape.heads, 3, shape.d, 0 if shape.latent else shape.e)
    out = Storage(on, layer, rows, n_pages, latent=shape.e if shape.latent else 0)
    n = min(shape.heads * n_pages, 2048)  # different blocks
    blocks = rng.integers(0, 256, (n, out.layout.bytes), dtype=np.uint8)
    scales = (rng.random((n, 2 * shape.d), dtype=np.float32) * 0.2).astype(np.float16)
    blocks[:, out.part_at("k")[1]] = scales.view(np.uint8)
    if not shape.latent:
        v = out.part_at("v")[1]
        blocks[:, v.start : v.start + PAGE] = rng.integers(120, 140, (n, PAGE))
        blocks[:, v.start + PAGE : v.stop] = rng.integers(-9, 9, (n, PAGE)).astype(np.int8)
    out.set_pages(np.resize(blocks, (1, shape.heads, n_pages, blocks.shape[1])))
    return out


def caller(
    on: gpu.Cuda, shape: Shape, layers: list[Storage], n_pages: int, rng: np.random.Generator
) -> tuple[Callable[[int, int], None], list[Any]]:
    """One launch of attention on layer i modulo their number; and what must live as long."""
    ffi, lib = native.load()
    n_head = shape.heads * shape.n_rep
    states = np.full(n_pages, SEALED, np.int32)
    states[0], states[-2], states[-1] = 0, 1, 2
    a = ffi.new("xq_attend_args *")
    a.n_head, a.n_tokens, a.n_streams, a.n_kv_pages, a.n_parts = n_head, 1, 1, n_pages, min(shape.parts, n_pages)
    a.scale, a.q_head_stride, a.q_token_stride = shape.d**-0.5, 4 * shape.d, 4 * shape.d * n_head
    keep: list[Any] = [
        a,
        Buffer(on, rng.standard_normal((n_head, shape.d), dtype=np.float32)),
        Buffer(on, states),
        Buffer(on, np.zeros(n_pages * PAGE, np.float16)),
        Buffer(on, 4 * int(lib.xq_attend_states(layers[0].c, a))),
        Buffer(on, n_head * shape.e * 4),
        Buffer(on, np.zeros(n_head, np.uint32)),
    ]
    a.q, a.table, a.mask = keep[1].pointer("float"), keep[2].pointer("int32_t"), keep[3].pointer("uint16_t")
    a.partial, a.out, a.arrivals = keep[4].pointer("float"), keep[5].pointer("float"), keep[6].pointer("uint32_t")
    return lambda i, stream: on.enqueue("attend", layers[i % len(layers)].c, a, stream), keep


def measured(
    on: gpu.Cuda, shape: Shape, name: str, n_tokens: int, rounds: int, bandwidth: float, rng: np.random.Generator
) -> dict[str, Any]:
    """One layer's row of the table."""
    n_pages = n_tokens // PAGE
    layer = layer_of(name)
    layers = [sealed_layer(on, shape, layer, n_pages, rng) for _ in range(COPIES)]
    attend, _keep = caller(on, shape, layers, n_pages, rng)
    ms = milliseconds(attend, rounds)
    n_bytes = shape.heads * n_pages * int(layers[0].layout.bytes)
    kernel = on.attend_kernel(layers[0].c)
    return {"tokens": n_tokens, "layer": name, "kernel": kernel, "ms": ms, "bytes": n_bytes,
            "floor_ms": n_bytes / bandwidth * 1e3}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--tokens", default="131072,32768")
    parser.add_argument("--layers", default="k4v2,k3v2,k2v1")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--f16", type=int, default=1, help="0: without llama.cpp's own operation")
    parser.add_argument("--json")
    args = parser.parse_args()
    rng, on = np.random.default_rng(0), gpu.Cuda()
    bandwidth = copy_bandwidth(on)
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s", flush=True)
    rows: list[dict[str, Any]] = []
    lines = [["shape", "tokens", "layer", "kernel", "ms", "GB/s", "floor, ms", "share", "f16, ms", "f16 /"]]
    for text in args.shapes.split(","):
        shape = Shape.of(text)
        for n_tokens in map(int, args.tokens.split(",")):
            f16 = None
            if args.f16 and op_cuda.available():
                sizes = (shape.d, shape.e, shape.heads * shape.n_rep, shape.heads, shape.latent)
                f16 = op_cuda.attention_ms(*sizes, n_tokens, COPIES, LAUNCHES, args.rounds)
            for name in shape.names(args.layers.split(",")):
                r = measured(on, shape, name, n_tokens, args.rounds, bandwidth, rng)
                rows.append({"shape": text, **r, "f16_ms": f16})
                numbers = [f"{r['ms']:.4f}", f"{r['bytes'] / r['ms'] / 1e6:.0f}", f"{r['floor_ms']:.4f}"]
                beside = [f"{f16:.4f}", f"{f16 / r['ms']:.1f}"] if f16 else ["", ""]
                share = f"{r['floor_ms'] / r['ms']:.0%}"
                lines.append([text, str(n_tokens), name, r["kernel"], *numbers, share, *beside])
    print(table(lines))
    if args.json:
        Path(args.json).write_text(json.dumps({"copy_bandwidth": bandwidth, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
