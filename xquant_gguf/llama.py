"""Llama: llama_cpp.Llama with a choice of KV cache."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xquant_gguf import fork, native
from xquant_gguf.plan import MADE, Plan, named_preset, preset_names
from xquant_gguf.sizes import LLAMA_TYPES, cache_info, llama_cpp, warning_of, xquant_overrides

_TYPE_NAMES = {number: name for name, (number, _) in LLAMA_TYPES.items()} | {fork.GGML_TYPE_XQUANT: "xquant"}


class Llama(llama_cpp.Llama):
    """llama_cpp.Llama with kv_type and kv_plan; everything else is as it is there."""

    def __init__(
        self,
        model_path: str,
        *,
        kv_type: str | None = None,
        kv_plan: str | Path | Mapping[str, Any] | Plan | None = None,
        **kwargs: Any,
    ) -> None:
        """Loads a GGUF model.

        kv_type: "xquant" or another preset (xquant-small, xquant-tiny, xquant-paper, xquant-paper-128), or one of
        llama.cpp's own types (f16, q8_0, q4_0, ...); None: llama.cpp's default.  kv_plan: what each layer stores, as a
        Plan, a dictionary or a JSON file; implies XQuant.  Quantized caches turn flash attention on.

        Raises ValueError if arguments contradict each other, or the model cannot have such a cache.
        """
        self._stack = contextlib.ExitStack()  # llama_cpp closes it even if a check below raises
        self._kv_type = checked_kv_type(kv_type, kv_plan, kwargs)
        self._kv_plan = kv_plan
        self._given_overrides = kwargs.get("kv_overrides")
        kwargs["verbose"] = verbose = kwargs.get("verbose", True)
        if self._kv_type in LLAMA_TYPES:
            kwargs["type_k"] = kwargs["type_v"] = LLAMA_TYPES[self._kv_type][0]
            if LLAMA_TYPES[self._kv_type][1] < 16:
                kwargs["flash_attn"] = True
        elif self._kv_type is not None:
            kwargs["type_k"] = kwargs["type_v"] = fork.GGML_TYPE_XQUANT
            kwargs["flash_attn"] = True
        with contextlib.ExitStack() as files:
            if self.is_xquant:
                given = kwargs.get("kv_overrides")
                kwargs["kv_overrides"] = files.enter_context(
                    xquant_overrides(model_path, str(self._kv_type), kv_plan, given)
                )
            try:
                super().__init__(model_path, **kwargs)
            except ValueError as error:
                reason = fork.error() if self.is_xquant else ""
                if reason:
                    raise ValueError(f"{model_path} with kv_type {self._kv_type!r}: {reason}") from error
                raise
        info = self.kv_cache_info()
        if verbose:
            print(f"xquant_gguf: {info}", file=sys.stderr)
        if self.is_xquant and (text := warning_of(info)):
            warnings.warn(text, stacklevel=2)

    @property
    def is_xquant(self) -> bool:
        """Whether the cache is an XQuant one."""
        return self._kv_type is not None and self._kv_type not in LLAMA_TYPES

    def kv_cache_info(self) -> dict[str, Any]:
        """What the KV cache stores and how much memory it takes.

        preset; k_bits, v_bits: bits of codes per layer; equivalent_bits: code bits per value, borrowed codes counted 0
        (arXiv 2510.11236); true_bits: bits per value of sealed tokens, everything counted; bytes_allocated;
        bytes_used: of these, what holds tokens now; pages_open, pages_sealed: pages in F16 and in codes; kernels: the
        kernel set in force; expected_kld: the KL divergence from F16 that calibration measured.  For sliding-window
        models the F16 cache of the sliding layers is in the bytes, and in bytes_sliding.
        """
        kv_type = self._kv_type or _TYPE_NAMES.get(self.context_params.type_k, "f16")
        info = cache_info(self._ctx.ctx, kv_type)
        return self._plain_info(kv_type) if info is None else {**info, "kernels": self.kernels()}

    def _plain_info(self, kv_type: str) -> dict[str, Any]:
        shapes, allocated = fork.shapes(self._ctx.ctx)
        bits = LLAMA_TYPES[kv_type][1]
        layers = [i for i, shape in enumerate(shapes) if shape.heads > 0]
        return {
            "preset": kv_type,
            "layers": layers,
            "k_bits": [bits for _ in layers],
            "v_bits": [bits for _ in layers],
            "equivalent_bits": bits,
            "true_bits": bits,
            "window": 0,
            "bytes_allocated": allocated,
            "bytes_used": allocated * min(self.n_tokens, self.n_ctx()) // max(self.n_ctx(), 1),
            "bytes_sliding": 0,
            "pages_open": 0,
            "pages_sealed": 0,
            "pages_free": 0,
            "nonfinite": 0,
            "expected_kld": None,
            "kernels": "llama.cpp",
        }

    @staticmethod
    def kernels() -> str:
        """Name of the kernel set in force."""
        ffi, lib = native.load()
        return str(ffi.string(lib.xq_kernels()).decode())

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        if self._kv_type is not None:
            del state["type_k"], state["type_v"]
            if self.is_xquant:
                del state["flash_attn"]
            state.update(kv_type=self._kv_type, kv_plan=self._kv_plan, kv_overrides=self._given_overrides)
        return state


def checked_kv_type(kv_type: str | None, kv_plan: Any, kwargs: Mapping[str, Any]) -> str | None:
    """The kv_type in force; ValueError if arguments (kwargs: the others of Llama) contradict each other."""
    presets = preset_names()
    if kv_type is not None and kv_type not in presets and kv_type not in LLAMA_TYPES:
        raise ValueError(f"kv_type is {kv_type!r}, must be one of {', '.join((*presets, *LLAMA_TYPES))}")
    if kv_plan is not None:
        if kv_type in LLAMA_TYPES:
            raise ValueError(f"kv_plan is given, but kv_type is {kv_type!r}: must be an XQuant preset or left out")
        named = named_preset(kv_plan)
        if (
            kv_type is not None
            and named is not None
            and named != kv_type
            and (named not in MADE or kv_type != "xquant")
        ):
            raise ValueError(f"kv_plan says preset {named!r}, but kv_type is {kv_type!r}: leave one of them out")
        kv_type = kv_type or named or "xquant"
        kv_type = "xquant" if kv_type in MADE else kv_type
        if kv_type not in presets:
            raise ValueError(f"kv_plan: preset is {kv_type!r}, must be one of {', '.join(presets)}")
    if kv_type is None:
        return None
    for name in ("type_k", "type_v"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is {kwargs[name]!r} beside kv_type {kv_type!r}: leave one of them out")
    quantized = kv_type in presets or LLAMA_TYPES[kv_type][1] < 16
    if quantized and kwargs.get("flash_attn") is False:
        raise ValueError(f"flash_attn is False, but kv_type {kv_type!r} needs flash attention: leave it out")
    named_keys = [key for key in kwargs.get("kv_overrides") or {} if key.startswith("xquant.")]
    if kv_type in presets and named_keys:
        raise ValueError(f"kv_overrides has {named_keys[0]!r} beside kv_type or kv_plan: leave one of them out")
    return kv_type


__all__ = ["LLAMA_TYPES", "Llama", "llama_cpp"]
