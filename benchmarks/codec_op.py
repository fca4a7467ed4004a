"""Speed of sealing, unsealing and the Hadamard transform alone, one page of one KV head on one thread.

usage: codec_op.py [--width 128] [--layers k4v2,k3v2,k2v1] [--kernels avx2,scalar] [--seconds 0.3] [--json FILE]

ns: per value.  floor: the bytes that are read and written (F16 rows and a sealed page) over the speed of a loop that
only reads memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from attention_op import sides_of
from op_graph import load, read_speed, timed
from xquant_gguf import codec, native
from xquant_gguf.cli.text import table
from xquant_gguf.plan import PAGE, side_to_c

N_PAGES = 256  # visited in turn


def calls(layer: str, width: int, kernels: str) -> tuple[dict[str, list[Callable[[], None]]], dict[str, int]]:
    """For each operation: one call for each page; the bytes that a call moves."""
    ffi, lib = native.load()
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((N_PAGES, PAGE, width), dtype=np.float32).astype(np.float16)
    valid = np.full(4, 0xFFFFFFFF, np.uint32)
    runs: dict[str, list[Callable[[], None]]] = {}
    sizes: dict[str, int] = {}
    for name, side in zip("kv", sides_of(layer), strict=True):
        c = ffi.new("xq_side *")
        side_to_c(c, side, name)
        n_codes = lib.xq_packed_bytes(side.bits, *((width, PAGE) if name == "k" else (PAGE, width)))
        n_param = 4 * width if name == "k" else 2 * PAGE
        codes, param = (np.zeros((N_PAGES, n), np.uint8) for n in (n_codes, n_param))
        more = [ffi.NULL] if name == "v" else []

        def seal(i: int, name: str = name, c: Any = c, codes: Any = codes, param: Any = param, more: Any = more) -> Any:
            args = (
                c, width, ffi.from_buffer("uint16_t[]", rows[i]), width, ffi.from_buffer("uint32_t[]", valid),
                ffi.from_buffer("uint8_t[]", codes[i]), ffi.from_buffer("uint8_t[]", param[i]), ffi.NULL, 0, *more,
            )  # fmt: skip
            return lambda: forced(kernels, lambda: getattr(lib, f"xq_seal_{name}")(*args))

        def unseal(
            i: int, name: str = name, c: Any = c, codes: Any = codes, param: Any = param, more: Any = more
        ) -> Any:
            args = (
                c, width, ffi.from_buffer("uint8_t[]", codes[i]), c.bits, ffi.from_buffer("uint8_t[]", param[i]),
                ffi.from_buffer("uint16_t[]", rows[i]), width, *more,
            )  # fmt: skip
            return lambda: forced(kernels, lambda: getattr(lib, f"xq_unseal_{name}")(*args))

        for what, make in (("seal", seal), ("unseal", unseal)):
            runs[f"{what} {name}{side.bits}"] = [make(i) for i in range(N_PAGES)]
            sizes[f"{what} {name}{side.bits}"] = 2 * PAGE * width + n_codes + n_param
    return runs, sizes


def forced(kernels: str, call: Callable[[], int]) -> None:
    _, lib = native.load()
    if lib.xq_kernels_force(kernels.encode()) != 0 or call() < 0:
        raise ValueError(native.error())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", default="k4v2,k3v2,k2v1")
    parser.add_argument("--kernels", default=",".join(name for name in codec.kernel_sets() if name != "avx512"))
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--json")
    args = parser.parse_args()
    load()
    speed = read_speed(1)
    lines, results = [["layer", "operation", "kernels", "ns a value", "GB/s", "floor ns"]], []
    values = PAGE * args.width
    for layer in args.layers.split(","):
        for kernels in args.kernels.split(","):
            runs, sizes = calls(layer, args.width, kernels)
            for name, (seconds, _) in timed(runs, args.seconds).items():
                row = {
                    "layer": layer, "operation": name, "kernels": kernels, "ns": seconds / values * 1e9,
                    "gb_per_s": sizes[name] / seconds / 1e9, "floor_ns": sizes[name] / speed / values * 1e9,
                }  # fmt: skip
                results.append(row)
                lines.append([layer, name, kernels, *(f"{row[x]:.2f}" for x in ("ns", "gb_per_s", "floor_ns"))])
    print(table(lines))
    if args.json:
        Path(args.json).write_text(json.dumps({"width": args.width, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
