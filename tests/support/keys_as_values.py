"""Tiny random models whose values are channels of keys: latent attention (MLA), Gemma 4 without values of its own."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import gguf
import numpy as np

from support import tiny_gguf
from support.storage import Floats
from xquant_gguf import synthetic

LATENT = synthetic.Latent(q_rank=48, kv_rank=64, rope_dim=32)
LATENT_SHAPE = synthetic.Shape(3, 128, 64, 4, 1, 64, 300, value_dim=32, latent=LATENT)

D, HEADS, TURNED, N_LAYER = 128, 4, 16, 4
SLIDING = [True, False, True, False]
STILL = [1.0] * TURNED + [1e30] * (D // 2 - TURNED)


def write_latent(path: Path) -> Path:
    with mock.patch.dict(synthetic.SHAPES, {"tiny-latent": LATENT_SHAPE}):
        return synthetic.write(path, "tiny-latent")


def write_gemma4(path: Path, factors: list[float] = STILL, *, smallest_weight: float = 0.5) -> Path:
    """A tiny random Gemma 4; factors: of RoPE's frequencies in the layers that do not slide."""
    rng = np.random.default_rng(0)
    shape = synthetic.Shape(N_LAYER, 128, 96, HEADS, 1, D, tiny_gguf.N_VOCAB, freq_base=1e6)
    writer = gguf.GGUFWriter(path, "gemma4")
    synthetic.add_shape(writer, shape, 4096)
    writer.add_sliding_window(128)
    writer.add_sliding_window_pattern(SLIDING)
    for name in ("key", "value"):
        writer.add_uint32(f"gemma4.attention.{name}_length_swa", 64)
    writer.add_uint32("gemma4.rope.dimension_count_swa", 64)
    writer.add_uint32("gemma4.embedding_length_per_layer_input", 0)
    tiny_gguf.add_tokenizer(writer)

    def matrix(out: int, n: int, gain: float = 1.0) -> Floats:
        return (rng.standard_normal((out, n)) * gain / np.sqrt(n)).astype(np.float32)

    def norm(n: int) -> Floats:
        return rng.uniform(0.5, 1.5, n).astype(np.float32)

    weights = {"token_embd.weight": matrix(shape.n_vocab, 128, 4), "output_norm.weight": norm(128)}
    weights["rope_freqs.weight"] = np.array(factors, np.float32)
    for il, slides in enumerate(SLIDING):
        d = 64 if slides else D
        k_norm = norm(d)
        k_norm[5] = smallest_weight
        layer: dict[str, Floats] = {
            "attn_norm": norm(128), "attn_q": matrix(HEADS * d, 128), "attn_k": matrix(d, 128),
            **({"attn_v": matrix(d, 128)} if slides else {}),
            "attn_output": matrix(128, HEADS * d), "attn_q_norm": norm(d) / np.float32(4), "attn_k_norm": k_norm,
            "post_attention_norm": norm(128), "ffn_norm": norm(128), "ffn_gate": matrix(96, 128),
            "ffn_up": matrix(96, 128), "ffn_down": matrix(128, 96), "post_ffw_norm": norm(128),
        }  # fmt: skip
        weights |= {f"blk.{il}.{name}.weight": x for name, x in layer.items()}
    tiny_gguf.finish(writer, weights)
    return path
