"""What caches llama.cpp would make for a model, and how large: asked of llama.cpp itself, without loading weights."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xquant_gguf import fork
from xquant_gguf.metadata import plan_block, plan_keys
from xquant_gguf.plan import Plan, Shape

fork.use()

import llama_cpp  # noqa: E402  (after fork.use, which chooses the library)
from llama_cpp._logger import set_verbose  # noqa: E402

# llama.cpp's own cache types: ggml type and bits per value
LLAMA_TYPES: dict[str, tuple[int, float]] = {
    "f32": (0, 32.0),
    "f16": (1, 16.0),
    "bf16": (30, 16.0),
    "q8_0": (8, 8.5),
    "q5_1": (7, 6.0),
    "q5_0": (6, 5.5),
    "q4_1": (3, 5.0),
    "iq4_nl": (20, 4.5),
    "q4_0": (2, 4.5),
}
COMPARED = ("f16", "q8_0", "q4_0")
UNCALIBRATED_LIMIT = 2.5
"""True bits below which a plan that was not calibrated is warned of."""
EXPECTED_KLD_LIMIT = 0.2
"""Expected KL divergence from F16 above which a plan is warned of: perplexity then rises by about a fifth."""


def override_array(overrides: Mapping[str, Any]) -> Any:
    """kv_overrides as llama.cpp takes them: an array that ends with an empty key."""
    array = (llama_cpp.llama_model_kv_override * (len(overrides) + 1))()
    for entry, (key, value) in zip(array, overrides.items(), strict=False):
        entry.key = key.encode()
        if isinstance(value, bool):
            entry.tag, entry.value.val_bool = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
        elif isinstance(value, int):
            entry.tag, entry.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, value
        elif isinstance(value, float):
            entry.tag, entry.value.val_f64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_FLOAT, value
        elif isinstance(value, str) and len(value.encode()) < 128:
            entry.tag, entry.value.val_str = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
        else:
            raise ValueError(f"kv_overrides: {key} is {value!r}, must be a bool, int, float or str of under 128 bytes")
    return array


class DryModel:
    """A GGUF model of which only metadata and vocabulary are loaded; a context manager.

    Caches of its contexts have their true sizes, but no memory.  Raises ValueError if the file cannot be read.
    """

    def __init__(self, model_path: str, overrides: Mapping[str, Any] | None = None) -> None:
        if not Path(model_path).exists():
            raise ValueError(f"Model path does not exist: {model_path}")
        set_verbose(False)
        llama_cpp.llama_backend_init()
        self._path = model_path
        self._overrides = override_array(overrides or {})
        params = llama_cpp.llama_model_default_params()
        params.no_alloc = True
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE  # to map the file would read all of it
        params.n_gpu_layers = 0
        self._no_devices = (ctypes.c_void_p * 1)()  # GPUs have nothing to do here, and would be given buffers
        params.devices = ctypes.addressof(self._no_devices)
        params.kv_overrides = self._overrides
        self._model = llama_cpp.llama_model_load_from_file(str(model_path).encode(), params)
        if not self._model:
            raise ValueError(f"Failed to load model from file: {model_path}")

    def __enter__(self) -> DryModel:
        return self

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_model_free(self._model)

    @contextmanager
    def context(
        self, kv_type: str, n_ctx: int, n_ubatch: int = 512, swa_full: bool | None = None
    ) -> Iterator[ctypes.c_void_p]:
        """A context with such a cache: "xquant" (the plan is that of the overrides) or a name of LLAMA_TYPES.

        n_ctx: tokens; 0: as many as the model was trained with.  Raises ValueError if llama.cpp refuses.
        """
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx or llama_cpp.llama_model_n_ctx_train(self._model)
        params.n_batch = params.n_ubatch = min(params.n_ctx, n_ubatch)
        number, bits = LLAMA_TYPES.get(kv_type, (fork.GGML_TYPE_XQUANT, 0.0))
        params.type_k = params.type_v = number
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if bits < 16 else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        if swa_full is not None:
            params.swa_full = swa_full
        ctx = llama_cpp.llama_init_from_model(self._model, params)
        if not ctx:
            reason = fork.error() if kv_type not in LLAMA_TYPES else ""
            raise ValueError(f"{self._path} with kv_type {kv_type!r}: {reason or 'llama.cpp refuses such a cache'}")
        try:
            yield ctx
        finally:
            llama_cpp.llama_free(ctx)


def model_layers(model_path: str, given: Mapping[str, Any] | None = None) -> tuple[list[Shape], list[int], int]:
    """Shapes and model numbers of the layers in a model's XQuant cache, and the number of layers of the model.

    given: kv_overrides.
    """
    asked = {**(given or {}), "xquant.preset": "xquant"}  # whatever plan the file carries, it may not fit
    with DryModel(model_path, asked) as model, model.context("xquant", 256) as ctx:
        return fork.layers(ctx)


@contextmanager
def xquant_overrides(
    model_path: str,
    preset: str,
    kv_plan: str | Path | Mapping[str, Any] | Plan | None,
    given: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """A preset, or a plan, as kv_overrides, valid within the context; given: the user's own, which stay.

    "xquant" is the plan that the model's file carries, if it carries one.  Which layers the model's cache has is asked
    of llama.cpp.  Raises ValueError if the plan does not fit them.
    """
    if kv_plan is None:
        yield dict(given or {}) if preset == "xquant" else {**(given or {}), "xquant.preset": preset}
        return
    source = kv_plan

    def give(shapes: list[Shape]) -> bytes:
        held = [i for i, shape in enumerate(shapes) if shape.heads > 0]
        plan = Plan.load(source, len(held), preset)
        plan.check([shapes[i] for i in held])
        return plan_block(plan_keys(plan, held, len(shapes)))

    with fork.plan_provider(give):
        yield dict(given or {})


def warning_of(info: Mapping[str, Any]) -> str | None:
    """What to say, in one line, of a cache that is likely to do harm; None if it is not."""
    bits, kld = info["true_bits"], info["expected_kld"]
    if kld is not None and kld > EXPECTED_KLD_LIMIT:
        return f"this cache's expected KL divergence from F16 is {kld:.3f}: calibrate the model with more bits"
    if kld is None and bits < UNCALIBRATED_LIMIT and info["window"] >= 0:
        return (
            f"{info['preset']} keeps {bits:.2f} bits a value, uncalibrated: better answers with xquant-gguf calibrate "
            "MODEL OUT, or kv_type 'xquant'"
        )
    return None


def cache_info(ctx: Any, kv_type: str) -> dict[str, Any] | None:
    """What the XQuant cache of a context stores (Llama.kv_cache_info says it in full); None if it has none."""
    info, found = fork.info(ctx), fork.plan(ctx, kv_type)
    if info is None or found is None:
        return None
    plan, shapes, layers = found
    return {
        "preset": kv_type,
        "layers": layers,
        "k_bits": [layer.k.bits for layer in plan.layers],
        "v_bits": [layer.v.bits for layer in plan.layers],
        "equivalent_bits": plan.equivalent_bits(),
        "true_bits": plan.true_bits(shapes),
        "window": plan.window,
        "bytes_allocated": info["bytes_allocated"] + info["bytes_other"],
        "bytes_used": info["bytes_used"] + info["bytes_other"],
        "bytes_sliding": info["bytes_other"],
        "pages_open": info["pages_open"],
        "pages_sealed": info["pages_sealed"],
        "pages_free": info["pages_free"],
        "nonfinite": info["n_nonfinite"],
        "expected_kld": info["expected_kld"] if info["expected_kld"] >= 0 else None,
    }


def inspect_cache(
    model_path: str,
    preset: str,
    kv_plan: str | Path | Mapping[str, Any] | Plan | None,
    *,
    n_ctx: int,
    n_ubatch: int = 512,
    swa_full: bool | None = None,
) -> tuple[dict[str, Any], dict[str, int | None], int]:
    """The XQuant cache of a model at n_ctx tokens, without loading weights.

    Returns what cache_info says of it, the bytes of the whole cache by type (f16, q8_0, q4_0, then the preset; None
    where llama.cpp refuses the type), and the n_ctx in force.  Raises ValueError if the model cannot have the cache.
    """
    sizes: dict[str, int | None] = {}
    with xquant_overrides(model_path, preset, kv_plan) as overrides, DryModel(model_path, overrides) as model:
        for kv_type in COMPARED:
            try:
                with model.context(kv_type, n_ctx, n_ubatch, swa_full) as ctx:
                    sizes[kv_type] = fork.shapes(ctx)[1]
            except ValueError:  # a block of the type does not divide the head
                sizes[kv_type] = None
        with model.context("xquant", n_ctx, n_ubatch, swa_full) as ctx:
            info, n_ctx = cache_info(ctx, preset), llama_cpp.llama_n_ctx(ctx)
    assert info is not None
    sizes[preset] = info["bytes_allocated"]
    return info, sizes, n_ctx


__all__ = [
    "LLAMA_TYPES",
    "DryModel",
    "cache_info",
    "inspect_cache",
    "llama_cpp",
    "model_layers",
    "set_verbose",
    "xquant_overrides",
]
