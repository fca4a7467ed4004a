"""The largest context that a GPU holds beside a model's weights, by cache type: by inspect's figures, and allocated.

usage: largest_context.py [MODEL] [--shape llama-8b] [--kv-types f16,xquant] [--n-ubatch 512] [--folder /dev/shm]

Writes a random model of the shape (F16 weights; llama-8b: 16 GB) into the folder, unless one is named, loads all of it
onto the first GPU, and makes contexts until the largest one is found that leaves 1 GiB free, to within half a percent;
one micro-batch is decoded in it.  (llama.cpp stops the process where CUDA finds no memory while it computes.)  "others"
is what is neither weights nor cache: llama.cpp's buffers for the graph, and CUDA's own.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support import gpu
from xquant_gguf import fork
from xquant_gguf.cli.text import table
from xquant_gguf.session import DecodeError, Model
from xquant_gguf.synthetic import write

STEP, KEEP_FREE = 256, 1 << 30


def free_bytes() -> tuple[int, int]:
    """Free and all memory of the GPU."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    gpu.check(gpu.driver().cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)))
    return free.value, total.value


def bytes_a_token(path: str, kv_type: str, n_ubatch: int) -> float:
    """What inspect's sizes grow by."""
    sizes = []
    with Model(path, weights=False) as model:
        for n_ctx in (1 << 16, 1 << 17):
            with model.session(kv_type, n_ctx=n_ctx, n_ubatch=n_ubatch, flash_attn=True) as context:
                info = fork.info(context.ctx)
                sizes.append(info["bytes_allocated"] if info else fork.shapes(context.ctx)[1])
    return float(sizes[1] - sizes[0]) / (1 << 16)


def fits(model: Model, kv_type: str, n_ctx: int, n_ubatch: int) -> bool:
    """Whether a context can be made, leaves enough free and decodes a micro-batch."""
    try:
        with model.session(kv_type, n_ctx=n_ctx, n_ubatch=n_ubatch, flash_attn=True) as context:
            if free_bytes()[0] < KEEP_FREE:
                return False
            context.decode([(5, i, (0,)) for i in range(n_ubatch)], "last")
            context.wait()
            return True
    except (ValueError, DecodeError):
        return False


def largest(model: Model, kv_type: str, n_ubatch: int, guess: int) -> int:
    """The largest n_ctx that fits."""
    low, high = 0, guess
    while fits(model, kv_type, high, n_ubatch):
        low, high = high, high * 5 // 4
    low = low or high // 2
    while high - low > max(STEP, low // 200):
        middle = (low + high) // 2 // STEP * STEP
        low, high = (middle, high) if fits(model, kv_type, middle, n_ubatch) else (low, middle)
    return low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--shape", default="llama-8b")
    parser.add_argument("--layers", type=int, default=0, help="0: as many as the real model")
    parser.add_argument("--kv-types", default="f16,xquant")
    parser.add_argument("--n-ubatch", type=int, default=512)
    parser.add_argument("--folder")
    args = parser.parse_args()
    lines = [["KV cache", "largest context", "ratio", "by inspect", "ratio", "cache, MiB", "others, MiB"]]
    first: tuple[int, float] | None = None
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = args.model or str(write(Path(folder) / "random.gguf", args.shape, args.layers))
        for kv_type in args.kv_types.split(","):
            a_token = bytes_a_token(path, kv_type, args.n_ubatch)
            before, total = free_bytes()
            with Model(path, n_gpu_layers=-1, one_gpu=True) as model:
                weights = before - free_bytes()[0]
                by_inspect = (before - weights) / a_token
                n = largest(model, kv_type, args.n_ubatch, int(by_inspect * 0.9) // STEP * STEP)
                with model.session(kv_type, n_ctx=n, n_ubatch=args.n_ubatch, flash_attn=True):
                    cache = a_token * n
                    others = before - weights - free_bytes()[0] - cache
            first = first or (n, by_inspect)
            ratios = f"{n / first[0]:.2f}", f"{by_inspect / first[1]:.2f}"
            mib = [f"{x / 2**20:.0f}" for x in (cache, others)]
            lines.append([kv_type, str(n), ratios[0], f"{by_inspect:.0f}", ratios[1], *mib])
    print(f"{total / 2**20:.0f} MiB of memory, {weights / 2**20:.0f} of them weights")
    print(table(lines))


if __name__ == "__main__":
    main()
