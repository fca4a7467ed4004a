"""The command inspect."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

from xquant_gguf.cli.options import UBATCH, Commands, add_command, at_least, cache_options, kv_type_of
from xquant_gguf.cli.text import bytes_table, table
from xquant_gguf.inspect import inspect_cache
from xquant_gguf.kv_types import LLAMA_TYPES, warning_of
from xquant_gguf.metadata import carried_keys
from xquant_gguf.plan import preset_names


def run(args: argparse.Namespace) -> int:
    preset = kv_type_of(args)
    if preset in LLAMA_TYPES:
        raise ValueError(f"kv_type is {preset!r}, must be one of {', '.join(preset_names())} to inspect its plan")
    found = inspect_cache(args.model, preset, args.kv_plan, n_ctx=args.n_ctx, n_ubatch=args.n_ubatch, n_seq=args.n_seq)
    info = found.info
    if text := warning_of(info):
        print(text, file=sys.stderr)
    carried = carried_keys(args.model)
    if args.json:
        plan = ("preset", "layers", "k_bits", "v_bits", "equivalent_bits", "true_bits", "window")
        keys = (*plan, "kernels", "llama_kernels")
        settings = {"n_ctx": found.n_ctx, "n_ubatch": args.n_ubatch, "n_seq": args.n_seq}
        n_bytes = {"kv_bytes": found.sizes, "compute_bytes": found.compute}
        print(json.dumps({**{k: info[k] for k in keys}, **settings, **n_bytes, "file": carried}, indent=2))
        return 0
    if info["layers"]:
        print_plan(info)
    print(bytes_table(found))
    if carried:
        print("\nin the file:")
    for name, value in carried.items():
        print(f"{name} = {' '.join(map(str, value)) if isinstance(value, list) else value}")
    return 0


def print_plan(info: Mapping[str, Any]) -> None:
    """What kv_cache_info says of a plan, with a table of its layers."""
    rows = [["layer", "K bits", "V bits"]]
    sides = zip(info["layers"], info["k_bits"], info["v_bits"], strict=True)
    rows += [[str(i), str(k), "part of K" if v is None else str(v)] for i, k, v in sides]
    print(
        f"{info['preset']}: {info['true_bits']:.3f} true bits, {info['equivalent_bits']:.3f} equivalent bits a value;"
    )
    kernels = f"kernels {info['kernels']}, llama.cpp's {info['llama_kernels']}"
    print(f"the newest {info['window']} tokens stay open; {kernels}")
    print(f"\n{table(rows)}\n")


def add(commands: Commands) -> None:
    """Declares it."""
    text = "what the cache stores, and its bytes at a context length"
    sub = add_command(commands, "inspect", run, text, n_ctx=32768)
    sub.add_argument("--n-ubatch", type=at_least(1), default=512, help=UBATCH)
    sub.add_argument("--n-seq", type=at_least(1), default=1, help="sequences that share the cache (default 1)")
    sub.add_argument("--json", action="store_true", help="print JSON")
    cache_options(sub)
