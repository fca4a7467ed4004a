"""Speed of decode and prompt attention alone, one layer, beside llama.cpp's own operation on the same shape.

usage: attention_op.py [--tokens 16384] [--shapes qwen,llama,small] [--layers k4v2,k3v2,k2v1] [--kernels avx2,avx512]
                       [--threads 1,2] [--prompt 64] [--seconds 1] [--mib 48] [--parts 0] [--json FILE]

f16, q8_0, q4_0: ggml_flash_attn_ext over a cache laid out as llama.cpp lays it out.  The others: pages of codes through
the verb of attention, split as the fork splits them.  All are nodes of ggml graphs, one graph of as many copies of the
layer as take --mib MiB, which the caches hold or not, timed in interleaved rounds: the median, and the least, which a
machine with other work still shows; both ratios.  ns: per cached token and KV head (prompt: and query row).  floor: the
bytes that are read over the speed of a loop that only reads memory.  The data are random: speed does not depend on
them.  Values of latent layers (MLA) are part of the keys, and the bits of values are not looked at.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from op_graph import F16, F32, Q4_0, Q8_0, Graph, in_turn, load, read_speed, sum_seconds, timed
from xquant_gguf import codec, native
from xquant_gguf.cli.text import table
from xquant_gguf.plan import PAGE, Side, side_to_c


@dataclass(frozen=True)
class Shape:
    """Heads of a layer, and their widths: e of values, or, of a latent layer, of the part of keys that they are."""

    name: str
    heads: int
    kv_heads: int
    d: int
    e: int
    latent: bool = False


SHAPES = {
    "qwen": Shape("Qwen2.5-1.5B", 12, 2, 128, 128),
    "llama": Shape("Llama-3-8B", 32, 8, 128, 128),
    "small": Shape("Qwen2.5-0.5B", 14, 2, 64, 64),
    "smol": Shape("SmolLM2-135M", 9, 3, 64, 64),
    "one": Shape("one KV head", 8, 1, 128, 128),
    "llama2": Shape("Llama-2-7B", 32, 32, 128, 128),
    "qwen36": Shape("Qwen3.6-27B", 24, 4, 256, 256),
    "wide16": Shape("16 heads of 256", 16, 1, 256, 256),
    "gemma4": Shape("Gemma-4-31B, global", 32, 4, 512, 512),
    "mla": Shape("DeepSeek-V2-Lite", 16, 1, 576, 512, latent=True),
    "mla320": Shape("Mistral 4", 32, 1, 320, 256, latent=True),
}
GGML_TYPES = {"f16": (F16, 1, 2), "q8_0": (Q8_0, 32, 34), "q4_0": (Q4_0, 32, 18)}  # type, values and bytes of a block
MAX_COPIES = 512  # of four nodes each; a graph takes 2,048


@dataclass(frozen=True)
class Row:
    """One cache on one shape: nanoseconds per cached token and KV head (and query row), and the bytes it reads."""

    shape: str
    cache: str
    kernels: str
    threads: int
    n_queries: int
    ns: float
    best_ns: float
    gb_per_s: float
    floor_ns: float


def queries(graph: Graph, shape: Shape, n_queries: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((shape.heads, n_queries, shape.d), dtype=np.float32)


def ggml_layer(kind: str, shape: Shape, n_tokens: int, n_queries: int) -> tuple[Graph, int]:
    """One layer of llama.cpp's cache and its attention; the bytes of keys and values."""
    number, values, size = GGML_TYPES[kind]
    rng = np.random.default_rng(0)
    widths = [shape.d] if shape.latent else [shape.d, shape.e]
    n_bytes = [n_tokens * shape.kv_heads * width // values * size for width in widths]
    graph = Graph(sum(n_bytes) + (n_tokens * n_queries + shape.heads * n_queries * shape.d * 2) * 4)
    sides = []
    for width, n in zip(widths, n_bytes, strict=True):
        raw = rng.integers(0, 256, (n // size, size), dtype=np.uint8)
        if number == F16:
            raw = rng.standard_normal(n // 2, dtype=np.float32).astype(np.float16)
        else:
            raw[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        sides.append(graph.tensor(number, width, shape.kv_heads, n_tokens, data=raw))
    if shape.latent:
        row = shape.d // values * size
        ne, nb = (shape.e, shape.kv_heads, n_tokens, 1), (row, row * shape.kv_heads, row * shape.kv_heads * n_tokens)
        sides.append(graph.base.ggml_view_4d(graph.ctx, sides[0], *ne, *nb, 0))
    sides = [graph.base.ggml_permute(graph.ctx, rows, 0, 2, 1, 3) for rows in sides]
    q = graph.tensor(F32, shape.d, n_queries, shape.heads, data=queries(graph, shape, n_queries))
    mask = graph.tensor(F16, n_tokens, n_queries)
    args = (graph.ctx, q, *sides, mask, shape.d**-0.5, 0.0, 0.0)
    graph.finish(graph.base.ggml_flash_attn_ext(*args))
    return graph, sum(n_bytes)


def sides_of(layer: str) -> tuple[Side, Side]:
    """Layer "k4v2" as the default presets store it."""
    return Side(int(layer[1]), PAGE), Side(int(layer[3]), 0, "lloyd", "log8", rotate=True)


def blocks(layer: Any, at: Any, shape: Shape, n_pages: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Random sealed pages [page][block] of an xq_layer with the block layout `at`."""
    _, lib = native.load()
    k_param = (rng.random((n_pages, 2, shape.d), dtype=np.float32) * 0.02).astype(np.float16)
    v_param = np.stack([rng.integers(120, 140, (n_pages, PAGE)), rng.integers(-9, 9, (n_pages, PAGE))], 1)
    sides = (layer.k.bits, shape.d, PAGE), (layer.v.bits, PAGE, shape.e)
    k_bytes, v_bytes = (lib.xq_packed_bytes(*side) for side in sides)
    out = np.zeros((n_pages, at.bytes), np.uint8)
    for start, part in (
        (at.k_codes, rng.integers(0, 256, (n_pages, k_bytes), dtype=np.uint8)),
        (at.k_param, k_param.view(np.uint8).reshape(n_pages, -1)),
        (at.v_codes, rng.integers(0, 256, (n_pages, v_bytes), dtype=np.uint8)),
        (at.v_param, v_param.astype(np.uint8).reshape(n_pages, -1)),
    )[: 2 if shape.latent else 4]:
        out[:, start : start + part.shape[1]] = part
    return out


def aligned(graph: Graph, data: NDArray[Any]) -> Any:
    """A copy that starts on a cache line."""
    raw = np.zeros(data.nbytes + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    raw[offset : offset + data.nbytes] = data.reshape(-1)
    return graph.pointer("uint8_t[]", raw) + offset


def xquant_layer(
    layer: str, shape: Shape, n_tokens: int, n_queries: int, n_threads: int, n_parts: int
) -> tuple[Graph, int]:
    """One layer of sealed pages and its attention; the bytes of the pages.  n_parts: 0: as the fork chooses."""
    n_head, n_kv, width, e = shape.heads, shape.kv_heads, shape.d, 0 if shape.latent else shape.e
    ffi, lib = native.load()
    graph = Graph(0)
    n_pages = n_tokens // PAGE
    c, at = ffi.new("xq_layer *"), ffi.new("xq_block_layout *")
    for side, into in zip(sides_of(layer), (c.k, c.v), strict=True):
        side_to_c(into, side, layer)
    lib.xq_block_layout_of(c, width, e, at)
    rng = np.random.default_rng(0)
    data = np.stack([blocks(c, at, shape, n_pages, rng) for _ in range(n_kv)])
    rows = graph.pointer("uint16_t[]", np.zeros(n_kv * PAGE * (width + e), np.uint16))
    store, a = graph.new("xq_store *"), graph.new("xq_attend_args *")
    area = ffi.new("xq_shape *", (width, e, n_kv, n_pages, 1, 1))
    if lib.xq_store_init(store, c, area, aligned(graph, data), 0, rows, 0) != 0:
        raise ValueError(native.error())
    if shape.latent and lib.xq_store_latent(store, shape.e) != 0:
        raise ValueError(native.error())
    a.q = graph.pointer("float[]", queries(graph, shape, n_queries))  # [head][query row][width]
    a.q_head_stride, a.q_token_stride = 4 * width * n_queries, 4 * width
    a.mask = graph.pointer("uint16_t[]", np.zeros(n_tokens, np.uint16))
    a.table = graph.pointer("int32_t[]", np.full(n_pages, -1, np.int32))
    a.n_head, a.n_tokens, a.n_streams, a.n_kv_pages = n_head, n_queries, 1, n_pages
    n_groups = n_kv * -(-n_queries * (n_head // n_kv) // int(lib.XQ_CPU_GROUP_ROWS))
    a.scale, a.n_parts = width**-0.5, n_parts or lib.xq_cpu_parts(n_groups, n_pages, n_threads)
    a.partial = graph.pointer("float[]", np.empty(lib.xq_attend_states(store, a), np.float32))
    a.arrivals = graph.pointer("uint32_t[]", np.zeros(n_groups, np.uint32))
    a.out = graph.pointer("float[]", np.empty(n_head * n_queries * shape.e, np.float32))
    job = graph.new("attend_job *", {"backend": lib.xq_cpu(), "store": store, "args": a})
    graph.finish(graph.node("attend_node", job))
    graph.run(1)
    if job.failed:
        raise ValueError(native.error())
    return graph, data.nbytes


def measure(
    shape: Shape, layers: Sequence[str], sets: Sequence[str], threads: int, n_tokens: int, n_queries: int,
    seconds: float, bytes_per_s: float, ggml: Sequence[str], n_bytes: int, n_parts: int,
) -> list[Row]:  # fmt: skip
    """All caches on one shape, interleaved."""
    runs: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    names: dict[str, tuple[str, str]] = {}
    counts: dict[str, int] = {}
    graphs: list[Graph] = []

    def add(key: str, made: tuple[Graph, int], force: str | None, again: Any) -> None:
        copies = [made[0]]
        while len(copies) * made[1] < n_bytes and len(copies) < MAX_COPIES:
            copies.append(again()[0])
        together = in_turn(copies)
        graphs.extend((*copies, together))
        sizes[key], counts[key] = made[1], len(copies)

        def run() -> None:
            if force:
                native.load()[1].xq_kernels_force(force.encode())
            together.run(threads)

        runs[key] = [run]

    for kind in ggml:
        names[kind] = (kind, "ggml")
        add(
            kind,
            ggml_layer(kind, shape, n_tokens, n_queries),
            None,
            lambda k=kind: ggml_layer(k, shape, n_tokens, n_queries),
        )
    for layer in layers:
        for kernels in sets:
            key = f"{layer} {kernels}"
            names[key] = (layer, kernels)
            args = (layer, shape, n_tokens, n_queries, threads, n_parts)
            add(key, xquant_layer(*args), kernels, lambda a=args: xquant_layer(*a))
    found = timed(runs, seconds)
    for graph in graphs:
        graph.close()
    n_rep = shape.heads // shape.kv_heads
    unit = 1e9 / (n_tokens * shape.kv_heads * (1 if n_queries == 1 else n_queries * n_rep))
    rows = []
    for key, times in found.items():
        median, best = (seconds / counts[key] for seconds in times)
        speed, floor = sizes[key] / median / 1e9, sizes[key] / bytes_per_s * unit
        rows.append(Row(shape.name, *names[key], threads, n_queries, median * unit, best * unit, speed, floor))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384, help="a multiple of 128 (default %(default)s)")
    parser.add_argument("--shapes", default="qwen,llama", help=f"of {','.join(SHAPES)} (default %(default)s)")
    parser.add_argument("--layers", default="k4v2,k2v1", help="bits of keys and values (default %(default)s)")
    parser.add_argument("--kernels", default=",".join(codec.kernel_sets()[:-1]), help="default: %(default)s")
    parser.add_argument("--ggml", default="f16,q8_0,q4_0", help="llama.cpp's caches (default %(default)s)")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--prompt", type=int, default=1, help="query rows of a head (default 1: decode)")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each cache (default %(default)s)")
    parser.add_argument("--mib", type=int, default=48, help="of copies of a layer, of each cache (default %(default)s)")
    parser.add_argument("--parts", type=int, default=0, help="of the pages of a KV head (default: as the fork chooses)")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.tokens < PAGE or args.tokens % PAGE != 0:
        parser.error(f"--tokens is {args.tokens}, must be a multiple of {PAGE}")
    load()
    rows: list[Row] = []
    heads = ["ns", "best ns", "GB/s", "floor ns", "f16 /", "best", "q4_0 /", "best"]
    lines = [["shape", "threads", "cache", "kernels", *heads]]
    for threads in map(int, args.threads.split(",")):
        speed = read_speed(threads)
        gain = sum_seconds(1) / sum_seconds(threads)
        print(f"{threads} threads read {speed / 1e9:.1f} GB/s, and do arithmetic {gain:.1f} times as fast as one")
        for name in args.shapes.split(","):
            found = measure(
                SHAPES[name], args.layers.split(","), args.kernels.split(","), threads, args.tokens, args.prompt,
                args.seconds, speed, [kind for kind in args.ggml.split(",") if kind], args.mib << 20, args.parts,
            )  # fmt: skip
            base = {row.cache: row for row in found}
            for r in found:
                numbers = [f"{x:.2f}" for x in (r.ns, r.best_ns, r.gb_per_s, r.floor_ns)]
                for kind in ("f16", "q4_0"):
                    b = base.get(kind)
                    numbers += [f"{b.ns / r.ns:.1f}", f"{b.best_ns / r.best_ns:.1f}"] if b else ["", ""]
                lines.append([r.shape, str(threads), r.cache, r.kernels, *numbers])
            rows += found
    print(table(lines))
    if args.json:
        Path(args.json).write_text(
            json.dumps({"tokens": args.tokens, "results": [asdict(row) for row in rows]}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
