"""Random tiny models as GGUF files: F32 weights and a byte vocabulary, loaded by llama.cpp in milliseconds.

Three architectures cover what a KV cache can meet: `llama` (RoPE on interleaved pairs), `qwen2` (RoPE on halves, biases
on query, key and value) and `mimo2` (as qwen2 without biases, but key and value heads may differ in width, and every
head has an attention sink). llama.cpp insists on a sliding layer in mimo2: the last one, whose attention adds zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from xquant_gguf import synthetic

Weights = dict[str, NDArray[np.float32]]

N_VOCAB = 288  # special tokens, bytes, then single letters


@dataclass(frozen=True)
class Shape:
    """What a tiny model looks like; the defaults are grouped-query attention with heads of 64."""

    arch: str = "llama"
    n_layer: int = 4
    n_embd: int = 96
    n_ff: int = 160
    n_head: int = 4
    n_head_kv: int = 2
    key_length: int = 64
    value_length: int = 64
    freq_base: float = 10000.0
    rms_eps: float = 1e-5
    n_ctx: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if self.arch not in ("llama", "qwen2", "mimo2"):
            raise ValueError(f"arch must be llama, qwen2 or mimo2, not {self.arch!r}")
        if self.arch != "mimo2" and self.key_length != self.value_length:
            raise ValueError(f"{self.arch} needs key_length = value_length, not {self.key_length}, {self.value_length}")
        if self.arch == "qwen2" and self.n_embd != self.n_head * self.key_length:
            raise ValueError(f"qwen2 needs n_embd = n_head * key_length, not {self.n_embd}")
        if self.n_head % self.n_head_kv != 0:
            raise ValueError(f"n_head_kv must divide n_head = {self.n_head}, not {self.n_head_kv}")

    def widths(self) -> synthetic.Shape:
        """What its file says of it."""
        sizes = self.n_layer, self.n_embd, self.n_ff, self.n_head, self.n_head_kv, self.key_length, N_VOCAB
        return synthetic.Shape(*sizes, self.value_length, self.freq_base, self.rms_eps)

    @property
    def rope_halves(self) -> bool:
        """RoPE turns channel i with i + d/2 instead of 2i with 2i + 1."""
        return self.arch != "llama"


# What most tests need: a model, and one whose last layer slides.
MODELS = {"plain": Shape(), "sliding": Shape(arch="mimo2", n_layer=3)}


def random_weights(shape: Shape) -> Weights:
    """Weights by their GGUF names, matrices as [out][in].

    Scores have a standard deviation of about 1, so that every page matters. What a layer adds is small beside the
    residual stream: a code that flips because a key differs in its last bit stays a small error, where larger gains
    would let it flip codes in all later layers. Keys with biases get channels with a large constant part, as real
    models have them.
    """
    rng = np.random.default_rng(shape.seed)

    def matrix(n_out: int, n_in: int, gain: float) -> NDArray[np.float32]:
        values: NDArray[np.float32] = (rng.standard_normal((n_out, n_in)) * gain / np.sqrt(n_in)).astype(np.float32)
        return values

    def norm(n: int) -> NDArray[np.float32]:
        return (1.0 + 0.1 * rng.standard_normal(n)).astype(np.float32)

    n_q, n_k = shape.n_head * shape.key_length, shape.n_head_kv * shape.key_length
    n_v, n_o = shape.n_head_kv * shape.value_length, shape.n_head * shape.value_length
    weights: Weights = {
        "token_embd.weight": matrix(N_VOCAB, shape.n_embd, np.sqrt(shape.n_embd)),
        "output_norm.weight": norm(shape.n_embd),
        "output.weight": matrix(N_VOCAB, shape.n_embd, 2.0),
    }
    for il in range(shape.n_layer):
        block = f"blk.{il}."
        weights[block + "attn_norm.weight"] = norm(shape.n_embd)
        weights[block + "attn_q.weight"] = matrix(n_q, shape.n_embd, 1.0)
        weights[block + "attn_k.weight"] = matrix(n_k, shape.n_embd, 1.0)
        weights[block + "attn_v.weight"] = matrix(n_v, shape.n_embd, 1.0)
        weights[block + "attn_output.weight"] = matrix(shape.n_embd, n_o, 0.2)
        if shape.arch == "qwen2":
            for name, n, gain in (("q", n_q, 0.3), ("k", n_k, 2.0), ("v", n_v, 0.3)):
                weights[block + f"attn_{name}.bias"] = (gain * rng.standard_normal(n)).astype(np.float32)
        if shape.arch == "mimo2":
            weights[block + "attn_sinks.weight"] = (2.0 + rng.standard_normal(shape.n_head)).astype(np.float32)
            if il == shape.n_layer - 1:
                weights[block + "attn_output.weight"][:] = 0.0
        weights[block + "ffn_norm.weight"] = norm(shape.n_embd)
        weights[block + "ffn_gate.weight"] = matrix(shape.n_ff, shape.n_embd, 1.0)
        weights[block + "ffn_up.weight"] = matrix(shape.n_ff, shape.n_embd, 1.0)
        weights[block + "ffn_down.weight"] = matrix(shape.n_embd, shape.n_ff, 0.3)
    return weights


def write(path: Path, shape: Shape, weights: Weights) -> Path:
    """Writes the model as a GGUF file and returns its path."""
    writer = gguf.GGUFWriter(path, shape.arch)
    writer.add_name("tiny random model")
    synthetic.add_shape(writer, shape.widths(), shape.n_ctx)
    if shape.arch == "mimo2":
        writer.add_sliding_window(128)
        writer.add_sliding_window_pattern([il == shape.n_layer - 1 for il in range(shape.n_layer)])
        # The key must be there; the model has no experts.
        writer.add_expert_feed_forward_length(shape.n_ff)

    add_tokenizer(writer)
    finish(writer, weights)
    return path


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Special tokens, bytes, letters."""
    letters = [chr(ord("a") + i) for i in range(N_VOCAB - len(synthetic.SPECIAL) - synthetic.N_BYTES)]
    synthetic.add_vocabulary(writer, letters, gguf.TokenType.NORMAL)


def text(n: int, seed: int = 0) -> str:
    """n letters: as many tokens."""
    return "".join(chr(c) for c in np.random.default_rng(seed).integers(ord("a"), ord("z") + 1, n))


def finish(writer: gguf.GGUFWriter, weights: Weights) -> None:
    """Writes the tensors, those that the writer has already first, and closes the file."""
    for name, tensor in weights.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_projector(path: Path, n_embd: int, n_side: int = 16, patch: int = 4, width: int = 32, seed: int = 0) -> Path:
    """Writes a random CLIP encoder with LLaVA's projector: an image becomes n_side**2 embeddings of n_embd."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(n_side * patch)
    writer.add_vision_patch_size(patch)
    writer.add_vision_embedding_length(width)
    writer.add_vision_feed_forward_length(2 * width)
    writer.add_vision_projection_dim(n_embd)
    writer.add_vision_block_count(2)
    writer.add_vision_head_count(2)
    writer.add_vision_attention_layernorm_eps(1e-5)
    writer.add_vision_image_mean([0.5] * 3)
    writer.add_vision_image_std([0.25] * 3)
    shapes: dict[str, tuple[int, ...]] = {"v.patch_embd.weight": (width, 3, patch, patch), "v.class_embd": (width,)}
    shapes["v.position_embd.weight"] = (n_side**2 + 1, width)
    for il in range(2):
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            shapes[f"v.blk.{il}.{name}.weight"] = width, width
        shapes[f"v.blk.{il}.ffn_up.weight"], shapes[f"v.blk.{il}.ffn_down.weight"] = (
            (2 * width, width),
            (width, 2 * width),
        )
        for norm in ("ln1", "ln2"):
            shapes[f"v.blk.{il}.{norm}.weight"] = shapes[f"v.blk.{il}.{norm}.bias"] = (width,)
    shapes["mm.0.weight"], shapes["mm.2.weight"] = (n_embd, width), (n_embd, n_embd)
    shapes["mm.0.bias"] = shapes["mm.2.bias"] = (n_embd,)
    gains = {"mm.2.weight": 4.0}  # embeddings about as large as those of tokens
    weights: Weights = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape) * gains.get(name, 1.0) / np.sqrt(np.prod(shape[1:]))
        weights[name] = values.astype(np.float32)
    finish(writer, weights)
    return path


def write_lora(path: Path, arch: str, n_layer: int, n_embd: int, n_keys: int) -> Path:
    """A LoRA adapter of random weights for a model's keys; n_keys: their channels in a layer."""
    rng = np.random.default_rng(2)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    weights: Weights = {}
    for il in range(n_layer):
        name = f"blk.{il}.attn_k.weight"
        weights[f"{name}.lora_a"] = rng.standard_normal((4, n_embd)).astype(np.float32)
        weights[f"{name}.lora_b"] = 0.1 * rng.standard_normal((n_keys, 4)).astype(np.float32)
    finish(writer, weights)
    return path
