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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from support import gpu
from xquant_gguf import fork
from xquant_gguf.cli.text import table
from xquant_gguf.sizes import LLAMA_TYPES, DryModel, llama_cpp, override_array
from xquant_gguf.synthetic import write

STEP, KEEP_FREE = 256, 1 << 30


def free_bytes() -> tuple[int, int]:
    """Free and all memory of the GPU."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    gpu.check(gpu.driver().cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)))
    return free.value, total.value


def bytes_a_token(model: str, kv_type: str, n_ubatch: int) -> float:
    """What inspect's sizes grow by."""
    overrides = {} if kv_type in LLAMA_TYPES else {"xquant.preset": kv_type}
    sizes = []
    with DryModel(model, overrides) as dry:
        for n_ctx in (1 << 16, 1 << 17):
            with dry.context(kv_type if kv_type in LLAMA_TYPES else "xquant", n_ctx, n_ubatch) as ctx:
                info = fork.info(ctx)
                sizes.append(info["bytes_allocated"] if info else fork.shapes(ctx)[1])
    return float(sizes[1] - sizes[0]) / (1 << 16)


class Model:
    """All layers on the first GPU."""

    def __init__(self, path: str, kv_type: str, n_ubatch: int) -> None:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers, params.split_mode = -1, llama_cpp.LLAMA_SPLIT_MODE_NONE
        self.overrides = override_array({} if kv_type in LLAMA_TYPES else {"xquant.preset": kv_type})
        params.kv_overrides = self.overrides
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise ValueError(f"{path} could not be loaded")
        self.kv_type, self.n_ubatch = kv_type, n_ubatch

    def context(self, n_ctx: int) -> Any:
        """Null if it does not fit."""
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, self.n_ubatch, self.n_ubatch
        params.type_k = params.type_v = LLAMA_TYPES.get(self.kv_type, (fork.GGML_TYPE_XQUANT, 0))[0]
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        return llama_cpp.llama_init_from_model(self.model, params)

    def fits(self, n_ctx: int) -> bool:
        """Whether a context can be made, leaves enough free and decodes a micro-batch."""
        ctx = self.context(n_ctx)
        if not ctx or free_bytes()[0] < KEEP_FREE:
            llama_cpp.llama_free(ctx)
            return False
        tokens = (ctypes.c_int32 * self.n_ubatch)(*[5] * self.n_ubatch)
        done = llama_cpp.llama_decode(ctx, llama_cpp.llama_batch_get_one(tokens, self.n_ubatch)) == 0
        llama_cpp.llama_synchronize(ctx)
        llama_cpp.llama_free(ctx)
        return done

    def largest(self, guess: int) -> int:
        low, high = 0, guess
        while self.fits(high):
            low, high = high, high * 5 // 4
        low = low or high // 2
        while high - low > max(STEP, low // 200):
            middle = (low + high) // 2 // STEP * STEP
            low, high = (middle, high) if self.fits(middle) else (low, middle)
        return low

    def close(self) -> None:
        llama_cpp.llama_model_free(self.model)


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
            model = Model(path, kv_type, args.n_ubatch)
            weights = before - free_bytes()[0]
            by_inspect = (before - weights) / a_token
            n = model.largest(int(by_inspect * 0.9) // STEP * STEP)
            ctx = model.context(n)
            cache = a_token * n
            others = before - weights - free_bytes()[0] - cache
            llama_cpp.llama_free(ctx)
            model.close()
            first = first or (n, by_inspect)
            ratios = f"{n / first[0]:.2f}", f"{by_inspect / first[1]:.2f}"
            mib = [f"{x / 2**20:.0f}" for x in (cache, others)]
            lines.append([kv_type, str(n), ratios[0], f"{by_inspect:.0f}", ratios[1], *mib])
    print(f"{total / 2**20:.0f} MiB of memory, {weights / 2**20:.0f} of them weights")
    print(table(lines))


if __name__ == "__main__":
    main()
