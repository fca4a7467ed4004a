"""What Llama takes beside kv_type and kv_plan: llama_cpp.Llama's arguments.

llama_cpp.Llama itself swallows any other name; here one that is misspelt is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from numbers import Integral
from typing import Any, TypedDict

import llama_cpp
from llama_cpp.llama_chat_format import LlamaChatCompletionHandler
from llama_cpp.llama_speculative import LlamaDraftModel
from llama_cpp.llama_tokenizer import BaseLlamaTokenizer

OURS = ("kv_type", "kv_plan", "rpc_servers")


class LlamaOptions(TypedDict, total=False):
    """Keyword arguments of llama_cpp.Llama, with its types; a test holds them against its signature."""

    n_gpu_layers: int
    split_mode: int
    main_gpu: int
    tensor_split: list[float] | None
    vocab_only: bool
    use_mmap: bool
    use_mlock: bool
    kv_overrides: dict[str, bool | int | float | str] | None
    seed: int
    n_ctx: int
    n_batch: int
    n_ubatch: int
    n_threads: int | None
    n_threads_batch: int | None
    rope_scaling_type: int | None
    pooling_type: int
    attention_type: int
    rope_freq_base: float
    rope_freq_scale: float
    yarn_ext_factor: float
    yarn_attn_factor: float
    yarn_beta_fast: float
    yarn_beta_slow: float
    yarn_orig_ctx: int
    logits_all: bool
    embedding: bool
    offload_kqv: bool
    flash_attn: bool
    op_offload: bool | None
    swa_full: bool | None
    no_perf: bool
    last_n_tokens_size: int
    lora_base: str | None
    lora_scale: float
    lora_path: str | None
    numa: bool | int
    chat_format: str | None
    chat_handler: LlamaChatCompletionHandler | None
    draft_model: LlamaDraftModel | None
    tokenizer: BaseLlamaTokenizer | None
    type_k: int | None
    type_v: int | None
    spm_infill: bool
    verbose: bool


LOWEST = {"n_ctx": 0, "n_batch": 1, "n_ubatch": 1, "n_threads": 0, "n_threads_batch": 0, "n_gpu_layers": -1}
"""The least that numbers may be; llama.cpp takes what is less for a very large number, or stops the process."""
HIGHEST = 2**31 - 1


_PARAMETERS = inspect.signature(llama_cpp.Llama.__init__).parameters.values()
KNOWN = frozenset(p.name for p in _PARAMETERS if p.kind is p.KEYWORD_ONLY)
"""Keyword arguments of the installed llama_cpp.Llama."""


def check_names(names: Iterable[str]) -> None:
    """TypeError, with the nearest name that there is, if Llama has no such argument."""
    for name in names:
        if name not in KNOWN:
            near = get_close_matches(name, (*OURS, *sorted(KNOWN)), 1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"Llama has no argument {name!r}{hint}")


def check_numbers(options: Mapping[str, Any]) -> None:
    """ValueError if a number is out of range."""
    for name, low in LOWEST.items():
        value = options.get(name)
        if value is not None and not (isinstance(value, Integral) and low <= int(value) <= HIGHEST):
            raise ValueError(f"{name} is {value!r}, must be an integer from {low} to {HIGHEST}")
