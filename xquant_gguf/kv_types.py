"""Types of KV cache: XQuant's presets and llama.cpp's own, which of them arguments choose, and what to warn of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from xquant_gguf import fork
from xquant_gguf.plan import MADE, PlanSource, named_preset, preset_names

UNCALIBRATED_LIMIT = 2.5
"""True bits below which a plan that was not calibrated is warned of."""
EXPECTED_KLD_LIMIT = 0.2
"""Expected KL divergence from F16 above which a plan is warned of: perplexity then rises by about a fifth."""


class KvType(NamedTuple):
    """A cache type of llama.cpp: ggml's number of it, and bits per value."""

    number: int
    bits: float


def _llama_types(*names: str) -> dict[str, KvType]:
    found = fork.ggml_types()
    return {name: KvType(found[name].number, 8 * found[name].bytes / found[name].values) for name in names}


LLAMA_TYPES = _llama_types("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "iq4_nl", "q4_0")
"""llama.cpp's own cache types by name."""


def number_of(kv_type: str) -> int:
    """ggml's number of a cache type: a name of LLAMA_TYPES, or else XQuant."""
    return LLAMA_TYPES[kv_type].number if kv_type in LLAMA_TYPES else fork.GGML_TYPE_XQUANT


def described(number: int) -> tuple[str, float]:
    """Name and bits per value of a type by ggml's number; XQuant has 0 bits here, since its plan says how many."""
    for name, found in fork.ggml_types().items():
        if found.number == number and (found.values or number == fork.GGML_TYPE_XQUANT):
            return name, 8 * found.bytes / max(found.values, 1)
    raise ValueError(f"cache type {number} is unknown to ggml")


def needs_flash_attention(kv_type: str) -> bool:
    """Whether a cache type works with flash attention alone."""
    return kv_type not in LLAMA_TYPES or LLAMA_TYPES[kv_type].bits < 16


def type_and_plan(name: str) -> tuple[str | None, str | None]:
    """kv_type and kv_plan of Llama that a name stands for: a JSON file is a plan."""
    return (None, name) if name.endswith(".json") else (name, None)


def checked_kv_type(kv_type: str | None, kv_plan: PlanSource | None, others: Mapping[str, Any]) -> str | None:
    """The kv_type in force; ValueError if arguments (others: the rest of Llama's) contradict each other."""
    presets = preset_names()
    if kv_type is not None and kv_type not in presets and kv_type not in LLAMA_TYPES:
        raise ValueError(f"kv_type is {kv_type!r}, must be one of {', '.join((*presets, *LLAMA_TYPES))}")
    if kv_plan is not None:
        kv_type = _preset_of(kv_type, kv_plan)
    if kv_type is None:
        return None
    for name in ("type_k", "type_v"):
        if others.get(name) is not None:
            raise ValueError(f"{name} is {others[name]!r} beside kv_type {kv_type!r}: leave one of them out")
    if needs_flash_attention(kv_type) and others.get("flash_attn") is False:
        raise ValueError(f"flash_attn is False, but kv_type {kv_type!r} needs flash attention: leave it out")
    named_keys = [key for key in others.get("kv_overrides") or {} if key.startswith("xquant.")]
    if kv_type in presets and named_keys:
        raise ValueError(f"kv_overrides has {named_keys[0]!r} beside kv_type or kv_plan: leave one of them out")
    return kv_type


def _preset_of(kv_type: str | None, kv_plan: PlanSource) -> str:
    """The preset that a plan starts from, beside a kv_type."""
    if kv_type in LLAMA_TYPES:
        raise ValueError(f"kv_plan is given, but kv_type is {kv_type!r}: must be an XQuant preset or left out")
    named = named_preset(kv_plan)
    if kv_type is None:
        preset = "xquant" if named is None or named in MADE else named
        if preset not in preset_names():
            raise ValueError(f"kv_plan: preset is {preset!r}, must be one of {', '.join(preset_names())}")
        return preset
    if named not in (None, kv_type) and (named not in MADE or kv_type != "xquant"):
        raise ValueError(f"kv_plan says preset {named!r}, but kv_type is {kv_type!r}: leave one of them out")
    return kv_type


def warning_of(info: Mapping[str, Any]) -> str | None:
    """What to say, in one line, of a cache (Llama.kv_cache_info) that disappoints; None if there is nothing to say."""
    bits, kld = info["true_bits"], info["expected_kld"]
    if not info["layers"]:
        return f"{info['preset']} quantizes nothing: all layers of this model slide, and sliding layers stay F16"
    if kld is not None and kld > EXPECTED_KLD_LIMIT:
        return f"this cache's expected KL divergence from F16 is {kld:.3f}: calibrate the model with more bits"
    if kld is None and bits < UNCALIBRATED_LIMIT and info["window"] >= 0:
        return (
            f"{info['preset']} keeps {bits:.2f} bits a value, uncalibrated: better answers with xquant-gguf calibrate "
            "MODEL OUT, or kv_type 'xquant'"
        )
    return None
