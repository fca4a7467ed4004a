"""Speed of attention over pages alone, one KV head on one thread, without llama.cpp.

usage: attention_op.py [--tokens 16384] [--layers k4v2,k2v1] [--kernels avx2] [--seconds 0.5] [--json FILE]

Decode: the query heads that share one KV head, one new token; ns per cached token and KV head.  Prompt: 64 query rows
a call; ns per (row, cached token).  "F16" reads open pages only.  Medians of interleaved runs; the pages of many KV
heads are visited in turn, so that they do not all come from the cache.  The data are random: speed does not depend on
them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from xquant_gguf import codec, native
from xquant_gguf.cli.text import table
from xquant_gguf.plan import PAGE, Side, side_to_c

SHAPES = {"Qwen2.5-1.5B (12 heads, 2 KV, 128)": (6, 128), "Llama-3-8B (32, 8, 128)": (4, 128)} | {
    "Qwen2.5-0.5B (14, 2, 64)": (7, 64)
}
PROMPT_ROWS = 64
N_HEADS = 4  # KV heads visited in turn


def sides(layer: str) -> tuple[Side, Side]:
    """Layer "k4v2" as the default presets store it; "f16": anything, no page is sealed."""
    k_bits, v_bits = (4, 2) if layer == "f16" else (int(layer[1]), int(layer[3]))
    return Side(k_bits, PAGE), Side(v_bits, 0, "lloyd", "log8", rotate=True)


def caller(layer: str, n_rows: int, width: int, n_tokens: int) -> Callable[[], None]:
    """A function that attends with n_rows query rows to n_tokens tokens of the next KV head."""
    ffi, lib = native.load()
    rng = np.random.default_rng(0)
    n_pages, is_open = n_tokens // PAGE, layer == "f16"
    keep: list[Any] = []

    def pointer(ctype: str, array: np.ndarray) -> Any:
        keep.append(array)
        keep.append(ffi.from_buffer(ctype, array))
        return keep[-1]

    def head() -> Any:
        a = ffi.new("xq_attention *")
        a.d = a.e = width
        a.n_rows, a.page_end, a.scale = n_rows, n_pages, width**-0.5
        k, v = sides(layer)
        side_to_c(a.k, k, "k")
        side_to_c(a.v, v, "v")
        a.k_code_bits, a.v_code_bits = k.bits, v.bits
        a.page_slot = pointer("int32_t[]", np.arange(n_pages, dtype="i4") if is_open else np.full(n_pages, -1, "i4"))
        slots = n_pages if is_open else 1
        for name in ("k_window", "v_window"):
            rows = rng.standard_normal((slots, PAGE, width), dtype=np.float32)
            setattr(a, name, pointer("uint16_t[]", rows.astype(np.float16)))
        if not is_open:
            k_param = (rng.random((n_pages, 2, width), dtype=np.float32) * 0.2).astype(np.float16)
            v_param = np.stack([rng.integers(120, 140, (n_pages, PAGE)), rng.integers(-9, 9, (n_pages, PAGE))], 1)
            k_bytes, v_bytes = (lib.xq_packed_bytes(*n) for n in ((k.bits, width, PAGE), (v.bits, PAGE, width)))
            parts = [
                rng.integers(0, 256, (n_pages, k_bytes), dtype=np.uint8),
                k_param.view(np.uint8).reshape(n_pages, -1),
                rng.integers(0, 256, (n_pages, v_bytes), dtype=np.uint8),
                v_param.astype(np.uint8).reshape(n_pages, -1),
            ]
            sizes = [-(-part.shape[1] // 64) * 64 for part in parts]
            block = np.zeros((n_pages, sum(sizes)), np.uint8)
            start = pointer("uint8_t[]", block)
            for i, name in enumerate(("k_codes", "k_param", "v_codes", "v_param")):
                block[:, sum(sizes[:i]) : sum(sizes[:i]) + parts[i].shape[1]] = parts[i]
                setattr(a, name, start + sum(sizes[:i]))
                setattr(a, f"{name}_stride", block.shape[1])
        q = rng.standard_normal((n_rows, width), dtype=np.float32)
        partial = np.empty((n_rows, 2 * width + 2), np.float32)
        mask = np.zeros(n_tokens, np.float16)
        keep.append(ffi.new("const float *[]", [pointer("float[]", row) for row in q]))
        a.q = keep[-1]
        keep.append(ffi.new("float *[]", [pointer("float[]", row) for row in partial]))
        a.partial = keep[-1]
        keep.append(ffi.new("const uint16_t *[]", [pointer("uint16_t[]", mask)] * n_rows))
        a.mask = keep[-1]
        return a

    heads = itertools.cycle([head() for _ in range(N_HEADS)])

    def call() -> None:
        if lib.xq_attend(next(heads)) != 0:
            raise ValueError(native.error())
        assert keep  # the arrays live as long as the function

    return call


def medians(calls: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Median seconds of a call, in interleaved rounds of `seconds` in all for each."""
    runs: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    while min(sum(times) for times in runs.values()) < seconds:
        for name, call in calls.items():
            for _ in range(N_HEADS):
                start = time.perf_counter()
                call()
                runs[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384, help="a multiple of 128")
    parser.add_argument("--layers", default="k4v2,k3v2,k2v1", help="bits of keys and values")
    parser.add_argument("--kernels", default=codec.kernels())
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.tokens < PAGE or args.tokens % PAGE != 0:
        parser.error(f"--tokens is {args.tokens}, must be a multiple of {PAGE}")
    layers = ["f16", *args.layers.split(",")]
    rows, results = [["shape", "pages", "decode ns/token", "/ F16", "prompt ns/(row, token)", "/ F16"]], []
    with codec.force_kernels(args.kernels):
        for shape, (n_rows, width) in SHAPES.items():
            times = []
            for n in (n_rows, PROMPT_ROWS):
                calls = {layer: caller(layer, n, width, args.tokens) for layer in layers}
                times.append(medians(calls, args.seconds))
            decode, prompt = times
            for layer in layers:
                ns = decode[layer] / args.tokens * 1e9, prompt[layer] / args.tokens / PROMPT_ROWS * 1e9
                ratios = f"{decode[layer] / decode['f16']:.2f}", f"{prompt[layer] / prompt['f16']:.2f}"
                rows.append([shape, layer, f"{ns[0]:.1f}", ratios[0], f"{ns[1]:.2f}", ratios[1]])
                results.append({"shape": shape, "pages": layer, "decode_ns": ns[0], "prompt_ns": ns[1]})
    print(table(rows))
    if args.json:
        settings = {"tokens": args.tokens, "kernels": args.kernels}
        Path(args.json).write_text(json.dumps({"results": results, **settings}, indent=2) + "\n")


if __name__ == "__main__":
    main()
