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


@dataclass(frozen=True)
class Shape:
    """Widths of a llama-like model; n_layer: of the real one.  value_dim: of values, 0: as keys'."""

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


SHAPES = {
    "llama-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "qwen2.5-1.5b": Shape(28, 1536, 8960, 12, 2, 128, 151936),
    "qwen2.5-0.5b": Shape(24, 896, 4864, 14, 2, 64, 151936),
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 64, 49152),
}


def tensors(shape: Shape, n_layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes [out][in] of the weights."""
    n_q, n_kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    yield "token_embd.weight", (shape.n_vocab, shape.n_embd)
    yield "output_norm.weight", (shape.n_embd,)
    yield "output.weight", (shape.n_vocab, shape.n_embd)
    for i in range(n_layer):
        for name, size in (
            ("attn_norm", (shape.n_embd,)),
            ("attn_q", (n_q, shape.n_embd)),
            ("attn_k", (n_kv, shape.n_embd)),
            ("attn_v", (n_kv, shape.n_embd)),
            ("attn_output", (shape.n_embd, n_q)),
            ("ffn_norm", (shape.n_embd,)),
            ("ffn_gate", (shape.n_ff, shape.n_embd)),
            ("ffn_up", (shape.n_ff, shape.n_embd)),
            ("ffn_down", (shape.n_embd, shape.n_ff)),
        ):
            yield f"blk.{i}.{name}.weight", size


def write(path: str | Path, name: str, n_layer: int = 0) -> Path:
    """Writes a model of a shape of SHAPES with F16 weights, n_layer layers (0: all); ValueError names what is wrong."""
    if name not in SHAPES:
        raise ValueError(f"shape is {name!r}, must be one of {', '.join(SHAPES)}")
    shape = SHAPES[name]
    n_layer = n_layer or shape.n_layer
    if n_layer < 1:
        raise ValueError(f"layers is {n_layer}, must be at least 1")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"random, shape of {name}")
    add_shape(writer, replace(shape, n_layer=n_layer), N_CTX_TRAIN)
    n_named = shape.n_vocab - len(SPECIAL) - N_BYTES
    add_vocabulary(writer, [f"<unused {i}>" for i in range(n_named)], gguf.TokenType.UNUSED)
    for tensor, size in tensors(shape, n_layer):
        kind = np.float32 if len(size) == 1 else np.float16
        n_bytes = int(np.prod(size)) * np.dtype(kind).itemsize
        writer.add_tensor_info(tensor, size, np.dtype(kind), n_bytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for _, size in tensors(shape, n_layer):
        writer.write_tensor_data(_weights(rng, size))
    writer.close()
    return Path(path)


def _weights(rng: np.random.Generator, size: tuple[int, ...]) -> NDArray[np.generic]:
    """Norms are 1; matrices are normal with outputs as large as inputs, rows repeated: speed does not see it."""
    if len(size) == 1:
        return np.ones(size, np.float32)
    rows = (rng.standard_normal((min(size[0], 1024), size[1]), dtype=np.float32) * size[1] ** -0.5).astype(np.float16)
    return np.resize(rows, size)


def add_shape(writer: gguf.GGUFWriter, shape: Shape, n_ctx: int) -> None:
    """The keys that say what a llama-like model looks like; n_ctx: tokens that it was trained with."""
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.value_dim or shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.freq_base)
    writer.add_layer_norm_rms_eps(shape.rms_eps)
    writer.add_vocab_size(shape.n_vocab)


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
