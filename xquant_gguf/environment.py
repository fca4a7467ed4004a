"""XQUANT_KV_TYPE: gives our cache to programs that make llama_cpp.Llama and know nothing of xquant_gguf.

xquant_gguf_hook calls this when llama_cpp.Llama is made.  xquant_gguf.Llama is left alone: it has kv_type.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import llama_cpp

from xquant_gguf import fork
from xquant_gguf.inspect import CacheInfo
from xquant_gguf.kv_types import LLAMA_TYPES, checked_kv_type, needs_flash_attention, number_of
from xquant_gguf.llama import Llama
from xquant_gguf.log import explained

VARIABLE = "XQUANT_KV_TYPE"


def _say(text: str) -> None:
    print(f"xquant_gguf: {VARIABLE}={os.environ.get(VARIABLE, '')}: {text}", file=sys.stderr)


def with_kv_type(kv_type: str, options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of llama_cpp.Llama with this cache added; ValueError if there is no such type.

    A preset travels in kv_overrides, so that copies and pickles of the object have it too.
    """
    try:
        checked_kv_type(kv_type, None, {})
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {error}") from None
    out = {**options, "type_k": number_of(kv_type), "type_v": number_of(kv_type)}
    if needs_flash_attention(kv_type):
        out["flash_attn"] = True
    if kv_type not in LLAMA_TYPES and kv_type != "xquant":
        out["kv_overrides"] = {**(options.get("kv_overrides") or {}), "xquant.preset": kv_type}
    return out


def make(original: Callable[..., None], llm: llama_cpp.Llama, model_path: str, options: dict[str, Any]) -> None:
    """Calls llama_cpp.Llama's own __init__ with the cache that the variable names, and says so in one line.

    Types of cache that the program itself has chosen stay.  ValueError, with the reason, if the model cannot have it.
    """
    kv_type = os.environ.get(VARIABLE)
    if not kv_type or isinstance(llm, Llama) or options.get("vocab_only"):
        original(llm, model_path, **options)
        return
    chosen = [name for name in ("type_k", "type_v") if options.get(name) is not None]
    if chosen:
        original(llm, model_path, **options)
        if options[chosen[0]] != fork.GGML_TYPE_XQUANT:  # else it is a copy of an object that was made here
            _say(f"the program chose {chosen[0]}={options[chosen[0]]} itself, which stays")
        return
    given = with_kv_type(kv_type, options)
    with explained(f"{model_path} with {VARIABLE}={kv_type}", given["type_k"] == fork.GGML_TYPE_XQUANT):
        original(llm, model_path, **given)
    info = CacheInfo(llm.ctx, kv_type, (given["type_k"], given["type_v"])).now()
    _say(f"{info['true_bits']:.2f} bits per value, {info['bytes_allocated'] / 2**20:.0f} MiB of KV cache")
