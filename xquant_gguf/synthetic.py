"""Models with random weights and the shapes of well-known ones: to time large shapes without large downloads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

N_CTX_TRAIN = 1 << 20
N_BYTES = 256
SPECIAL = ("<unk>", "<s>", "</s>")
Q = gguf.GGMLQuantizationType
WEIGHTS = {"f16": Q.F16, "q8_0": Q.Q8_0, "q4_k": Q.Q4_K}
"""Types that matrices may have."""


@dataclass(frozen=True)
class Latent:
    """Ranks of queries and of what is cached, and the channels of a head's query and key that are rotated (MLA)."""

    q_rank: int
    kv_rank: int
    rope_dim: int


@dataclass(frozen=True)
class Shape:
    """Widths of a llama-like model; n_layer: of the real one.  value_dim: of values, 0: as keys'.

    latent: attention is that of DeepSeek-V2, with head_dim and value_dim behind the latent vectors.
    """

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    value_dim: int = 0
    freq_base: float = 500000.0
    rms_eps: float = 1e-5
    latent: Latent | None = None

    @property
    def arch(self) -> str:
        return "deepseek2" if self.latent else "llama"


SHAPES = {
    "llama-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "qwen2.5-1.5b": Shape(28, 1536, 8960, 12, 2, 128, 151936),
    "qwen2.5-0.5b": Shape(24, 896, 4864, 14, 2, 64, 151936),
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 64, 49152),
    # the layers of hybrids and of models with sliding layers that see all tokens
    "qwen3.6-27b": Shape(16, 5120, 17408, 24, 4, 256, 248320),
    "gemma-4-31b": Shape(10, 5376, 21504, 32, 4, 512, 262144),
    # its experts, as one dense layer of as many weights as a token uses
    "glm-4.7-flash": Shape(47, 2048, 10240, 20, 1, 256, 154880, 256, latent=Latent(768, 512, 64)),
}


def attention(shape: Shape) -> list[tuple[str, tuple[int, ...]]]:
    """What makes queries, keys and values of a layer."""
    n_head, n_kv, d, e = shape.n_head, shape.n_head_kv, shape.head_dim, shape.value_dim or shape.head_dim
    if shape.latent is None:
        sizes = {"q": n_head * d, "k": n_kv * d, "v": n_kv * e}
        return [(f"attn_{name}", (size, shape.n_embd)) for name, size in sizes.items()]
    q_rank, kv_rank, rope = shape.latent.q_rank, shape.latent.kv_rank, shape.latent.rope_dim
    return [
        ("attn_q_a", (q_rank, shape.n_embd)),
        ("attn_q_a_norm", (q_rank,)),
        ("attn_q_b", (n_head * d, q_rank)),
        ("attn_kv_a_mqa", (kv_rank + rope, shape.n_embd)),
        ("attn_kv_a_norm", (kv_rank,)),
        ("attn_k_b", (n_head, kv_rank, d - rope)),
        ("attn_v_b", (n_head, e, kv_rank)),
    ]


def tensors(shape: Shape, n_layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes [out][in] of the weights."""
    yield "token_embd.weight", (shape.n_vocab, shape.n_embd)
    yield "output_norm.weight", (shape.n_embd,)
    yield "output.weight", (shape.n_vocab, shape.n_embd)
    for i in range(n_layer):
        for name, size in (
            ("attn_norm", (shape.n_embd,)),
            *attention(shape),
            ("attn_output", (shape.n_embd, shape.n_head * (shape.value_dim or shape.head_dim))),
            ("ffn_norm", (shape.n_embd,)),
            ("ffn_gate", (shape.n_ff, shape.n_embd)),
            ("ffn_up", (shape.n_ff, shape.n_embd)),
            ("ffn_down", (shape.n_embd, shape.n_ff)),
        ):
            yield f"blk.{i}.{name}.weight", size


def write(path: str | Path, name: str, n_layer: int = 0, weights: str = "f16") -> Path:
    """Writes a model of a shape of SHAPES with n_layer layers (0: all); ValueError names what is wrong.

    weights: type of the matrices, of WEIGHTS; where a row is no multiple of its block, q8_0.
    """
    if name not in SHAPES:
        raise ValueError(f"shape is {name!r}, must be one of {', '.join(SHAPES)}")
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}, must be one of {', '.join(WEIGHTS)}")
    shape = SHAPES[name]
    n_layer = n_layer or shape.n_layer
    if n_layer < 1:
        raise ValueError(f"layers is {n_layer}, must be at least 1")
    writer = gguf.GGUFWriter(path, shape.arch)
    writer.add_name(f"random, shape of {name}")
    add_shape(writer, replace(shape, n_layer=n_layer), N_CTX_TRAIN)
    n_named = shape.n_vocab - len(SPECIAL) - N_BYTES
    add_vocabulary(writer, [f"<unused {i}>" for i in range(n_named)], gguf.TokenType.UNUSED)
    for tensor, size in tensors(shape, n_layer):
        kind = type_of(size, WEIGHTS[weights])
        values, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        row = (*size[:-1], size[-1] // values * n_bytes)  # of bytes
        writer.add_tensor_info(tensor, row, np.dtype(np.uint8), int(np.prod(row)), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for _, size in tensors(shape, n_layer):
        writer.write_tensor_data(_weights(rng, size, type_of(size, WEIGHTS[weights])))
    writer.close()
    return Path(path)


def type_of(size: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    """The type of a tensor of a model whose matrices are of a kind."""
    if len(size) == 1:
        return Q.F32
    return kind if size[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Q.Q8_0


def _weights(rng: np.random.Generator, size: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> NDArray[np.uint8]:
    """Norms are 1; matrices are random with outputs as large as inputs, rows repeated: speed does not see it."""
    if len(size) == 1:
        return np.ones(size, np.float32).view(np.uint8)
    n, width = min(int(np.prod(size[:-1])), 1024), size[-1]
    values, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    if kind == Q.F16:
        rows = (rng.standard_normal((n, width), dtype=np.float32) * width**-0.5).astype(np.float16).view(np.uint8)
    else:
        blocks = rng.integers(0, 256, (n, width // values, n_bytes), dtype=np.uint8)
        # of uniform codes; Q4_K: all scales and minima of a block are 32, the minimum is the codes' mean
        scale = np.float16(width**-0.5 / (73 if kind == Q.Q8_0 else 147))
        head = [scale] if kind == Q.Q8_0 else [scale, np.float16(7.5) * scale]
        blocks[..., : 2 * len(head)] = np.array(head, np.float16).view(np.uint8)
        if kind == Q.Q4_K:
            blocks[..., 4:16] = [0xA0] * 8 + [0] * 4
        rows = blocks.reshape(n, -1)
    return np.resize(rows, (*size[:-1], rows.shape[1]))


def add_shape(writer: gguf.GGUFWriter, shape: Shape, n_ctx: int) -> None:
    """The keys that say what a llama-like model looks like; n_ctx: tokens that it was trained with."""
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    if shape.latent is None:
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.value_dim or shape.head_dim)
        writer.add_rope_dimension_count(shape.head_dim)
    else:
        add_latent(writer, shape, shape.latent)
    writer.add_rope_freq_base(shape.freq_base)
    writer.add_layer_norm_rms_eps(shape.rms_eps)
    writer.add_vocab_size(shape.n_vocab)


def add_latent(writer: gguf.GGUFWriter, shape: Shape, latent: Latent) -> None:
    """The keys of latent attention, and that no layer has experts."""
    writer.add_q_lora_rank(latent.q_rank)
    writer.add_kv_lora_rank(latent.kv_rank)
    writer.add_key_length(latent.kv_rank + latent.rope_dim)
    writer.add_value_length(latent.kv_rank)
    writer.add_key_length_mla(shape.head_dim)
    writer.add_value_length_mla(shape.value_dim or shape.head_dim)
    writer.add_rope_dimension_count(latent.rope_dim)
    writer.add_leading_dense_block_count(shape.n_layer)
    writer.add_expert_feed_forward_length(shape.n_ff)
    writer.add_expert_shared_count(0)


def add_vocabulary(writer: gguf.GGUFWriter, more: Sequence[str], kind: gguf.TokenType) -> None:
    """Special tokens, bytes, and more tokens of one kind."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(N_BYTES)), *more]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * N_BYTES + [kind] * len(more)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(False)
