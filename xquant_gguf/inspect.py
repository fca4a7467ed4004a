"""What caches llama.cpp would make for a model, and how large: asked of llama.cpp itself, without loading weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import llama_cpp

from xquant_gguf import fork
from xquant_gguf.codec import kernels
from xquant_gguf.kv_types import described
from xquant_gguf.plan import PlanSource, Shape
from xquant_gguf.session import Model

COMPARED = ("f16", "q8_0", "q4_0")


def model_layers(model_path: str) -> tuple[list[Shape], list[int], int]:
    """Shapes and model numbers of the layers in a model's XQuant cache, and the number of layers of the model."""
    with Model(model_path, weights=False) as model:
        return model.cache_layers


_PLAIN: dict[str, Any] = {
    "window": 0,
    "bytes_other": 0,
    "pages_open": 0,
    "pages_bytes": 0,
    "pages_sealed": 0,
    "pages_free": 0,
    "nonfinite": 0,
    "expected_kld": None,
    "kernels": "llama.cpp",
}
"""What is so of all caches of llama.cpp's own."""


class CacheInfo:
    """What the cache of a context stores and holds, as Llama.kv_cache_info tells it.

    name: what to call an XQuant cache.  types: ggml's numbers of the types of keys and values, for other caches.
    What does not change while the context lives is asked once.
    """

    def __init__(self, ctx: Any, name: str, types: tuple[int, int]) -> None:
        self._ctx = ctx
        found = fork.plan(ctx, name)
        if found is None:
            self._fixed: dict[str, Any] = _of_llama_cpp(ctx, name, types)
            return
        plan, shapes, layers = found
        self._fixed = {
            "preset": name,
            "layers": layers,
            "k_bits": [layer.k.bits for layer in plan.layers],
            "v_bits": [layer.v.bits if s.e else None for layer, s in zip(plan.layers, shapes, strict=True)],
            "equivalent_bits": plan.equivalent_bits(shapes),
            "true_bits": plan.true_bits(shapes),
            "window": plan.window,
        }

    def now(self, n_tokens: int = 0) -> dict[str, Any]:
        """All of it; n_tokens: tokens in the cache, which says how much of a cache of llama.cpp's own is used."""
        fixed: dict[str, Any] = {
            name: list(value) if isinstance(value, list) else value for name, value in self._fixed.items()
        }
        info = fork.info(self._ctx)
        if info is None:
            n_ctx = max(int(llama_cpp.llama_n_ctx(self._ctx)), 1)
            fixed["llama_kernels"] = fork.cpu_variant()
            return {**fixed, "bytes_used": fixed["bytes_allocated"] * min(n_tokens, n_ctx) // n_ctx}
        return {
            **fixed,
            "bytes_allocated": info["bytes_allocated"] + info["bytes_other"],
            "bytes_used": info["bytes_used"] + info["bytes_other"],
            "bytes_other": info["bytes_other"],
            "pages_open": info["pages_open"],
            "pages_bytes": info["pages_bytes"],
            "pages_sealed": info["pages_sealed"],
            "pages_free": info["pages_free"],
            "nonfinite": info["n_nonfinite"],
            "expected_kld": info["expected_kld"] if info["expected_kld"] >= 0 else None,
            "kernels": kernels(),
            "llama_kernels": fork.cpu_variant(),
        }


def _of_llama_cpp(ctx: Any, asked: str, types: tuple[int, int]) -> dict[str, Any]:
    """The same of a context with a cache of llama.cpp's own, or, with a vocabulary alone, none."""
    shapes, allocated = fork.shapes(ctx)
    layers = [i for i, shape in enumerate(shapes) if shape.heads > 0] if allocated else []
    (k_name, k), (v_name, v) = (described(number) for number in types)
    name = k_name if k_name == v_name else f"{k_name}, {v_name}"
    values = [(shapes[i].d * shapes[i].heads, shapes[i].e * shapes[i].heads) for i in layers]
    mean = sum(d * k + e * v for d, e in values) / sum(d + e for d, e in values) if layers else (k + v) / 2
    return {
        "preset": asked if name == "xquant" else name,
        "layers": layers,
        "k_bits": [k for _ in layers],
        "v_bits": [v if shapes[i].e else None for i in layers],
        "equivalent_bits": (k + v) / 2,
        "true_bits": mean,
        "bytes_allocated": allocated,
        **_PLAIN,
    }


@dataclass(frozen=True)
class Inspected:
    """An XQuant cache that a model would have, beside others.

    info: what CacheInfo says of it.  sizes: bytes of the whole cache by type (f16, q8_0, q4_0, then the preset; None
    where llama.cpp refuses the type).  compute: bytes of the buffers in which prompts are processed, with flash
    attention, likewise; with the cache and the weights they are what a context takes.  n_ctx: the one in force.
    """

    info: dict[str, Any]
    sizes: dict[str, int | None]
    compute: dict[str, int | None]
    n_ctx: int


def inspect_cache(
    model_path: str,
    preset: str,
    kv_plan: PlanSource | None,
    *,
    n_ctx: int,
    n_ubatch: int = 512,
    n_seq: int = 1,
    swa_full: bool | None = None,
) -> Inspected:
    """The XQuant cache of a model at n_ctx tokens, which n_seq sequences share, without loading weights.

    n_ubatch: tokens of a micro-batch.  Raises ValueError if the model cannot have the cache.
    """
    sizes: dict[str, int | None] = {}
    compute: dict[str, int | None] = {}
    size: dict[str, Any] = {"n_ctx": n_ctx, "n_ubatch": n_ubatch, "swa_full": swa_full, "flash_attn": True}
    with Model(model_path, weights=False) as model:
        for kv_type in COMPARED:
            try:
                with model.session(kv_type, **size) as session:
                    sizes[kv_type] = fork.shapes(session.ctx)[1]
                    compute[kv_type] = fork.compute_bytes(session.ctx)
            except ValueError:  # a block of the type does not divide the head
                sizes[kv_type] = compute[kv_type] = None
        with model.session(preset, plan=kv_plan, **size) as session:
            info, n_ctx = CacheInfo(session.ctx, preset, (fork.GGML_TYPE_XQUANT,) * 2).now(), session.n_ctx
            compute[preset] = fork.compute_bytes(session.ctx)
            if found := fork.plan(session.ctx, preset):  # a cache takes memory for more sequences when they come
                plan, shapes, _ = found
                one, all_of_them = (plan.cache_bytes(shapes, n_ctx, n) for n in (1, n_seq))
                info["bytes_allocated"] += all_of_them - one
    sizes[preset] = info["bytes_allocated"]
    return Inspected(info, sizes, compute, n_ctx)
