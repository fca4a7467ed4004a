"""Stand-ins for the models that llama.cpp's tests of llama-server name, in a folder that it takes for a hub's cache.

What generates text is the first layers of a real model, so that chats have its vocabulary and template.  The rest has
random weights: a model that ranks, an encoder of pictures (256 embeddings for each, two pages), a LoRA adapter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from matplotlib.image import imsave

from support import tiny_gguf
from xquant_gguf import synthetic

COMMIT = "0" * 40
ORGANIZATION = "ggml-org"
SHORT_TOKENS = 100
"""So many pairs of letters make tokens in the stand-ins for models of 512: texts have about as many as there."""
WHOLE = 1 << 30
KEYS: dict[str, bool | int] = {
    "tokenizer.ggml.add_bos_token": True,
    # special tokens in the places of those that mark what lies around a gap
    "tokenizer.ggml.fim_pre_token_id": 5,
    "tokenizer.ggml.fim_suf_token_id": 6,
    "tokenizer.ggml.fim_mid_token_id": 7,
}
EMBEDS: dict[str, bool | int] = {"tokenizer.ggml.add_eos_token": True, "{arch}.pooling_type": gguf.PoolingType.MEAN}


def first_layers(
    model: Path, n_layer: int, out: Path, n_merges: int, keys: Mapping[str, bool | int] = KEYS, n_files: int = 1
) -> Path:
    """Copies a GGUF file's first layers and pairs of letters that make tokens, with keys of its own, to some files."""
    reader = gguf.GGUFReader(model)
    arch = reader.fields["general.architecture"].contents()
    tensors = [x for x in reader.tensors if not (m := re.match(r"blk\.(\d+)\.", x.name)) or int(m[1]) < n_layer]
    writer = gguf.GGUFWriter(out, arch, split_max_tensors=math.ceil(len(tensors) / n_files) if n_files > 1 else 0)
    own = {name.format(arch=arch): value for name, value in keys.items()} | {f"{arch}.block_count": n_layer}
    for name, value in own.items():
        kind = gguf.GGUFValueType.BOOL if isinstance(value, bool) else gguf.GGUFValueType.UINT32
        writer.add_key_value(name, value, kind)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture" and name not in own:
            value = field.contents()
            value = value[:n_merges] if name == "tokenizer.ggml.merges" else value
            writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    tiny_gguf.finish(writer, {})
    return out


def write_ranker(path: Path) -> Path:
    """A model with a cache that tells how well two texts fit: random, so that it tells nothing."""
    shape, rng = tiny_gguf.Shape(), np.random.default_rng(0)
    weights = tiny_gguf.random_weights(shape)
    weights["cls.output.weight"] = (0.1 * rng.standard_normal((2, shape.n_embd))).astype(np.float32)
    for il in range(shape.n_layer):
        for name in ("attn_q_norm", "attn_k_norm"):
            weights[f"blk.{il}.{name}.weight"] = np.ones(shape.key_length, np.float32)
    writer = gguf.GGUFWriter(path, "qwen3")
    synthetic.add_shape(writer, shape.widths(), shape.n_ctx)
    writer.add_pooling_type(gguf.PoolingType.RANK)
    writer.add_classifier_output_labels(["yes", "no"])
    tiny_gguf.add_tokenizer(writer)
    tiny_gguf.finish(writer, weights)
    return path


def write_picture(path: Path, seed: int) -> None:
    """One of coloured blocks."""
    imsave(path, np.random.default_rng(seed).random((4, 4, 3)).repeat(16, 0).repeat(16, 1))


def write(folder: Path, model: Path, n_layer: int) -> None:
    """Writes the cache's folder; model: a GGUF file that generates text."""

    def place(repository: str, file: str) -> Path:
        top = folder / f"models--{ORGANIZATION}--{repository}"
        path = top / "snapshots" / COMMIT / file
        path.parent.mkdir(parents=True, exist_ok=True)
        (top / "refs").mkdir(exist_ok=True)
        (top / "refs" / "main").write_text(COMMIT)
        return path

    short = first_layers(model, n_layer, place("test-model-stories260K", "stories260K-F32.gguf"), SHORT_TOKENS)
    place("test-model-stories260K-infill", "stories260K-infill-F32.gguf").symlink_to(short)
    place("models", "tinyllamas/stories260K.gguf").symlink_to(short)
    whole = first_layers(model, n_layer, place("tinygemma3-GGUF", "tinygemma3-Q8_0.gguf"), WHOLE)
    place("stories15M_MOE", "stories15M_MOE-F16.gguf").symlink_to(whole)
    place("tiny-llamas", "stories15M-q4_0.gguf").symlink_to(whole)
    first_layers(model, n_layer, place("models", "tinyllamas/split/stories15M-q8_0.gguf"), WHOLE, n_files=3)
    first_layers(model, n_layer, place("models", "bert-bge-small/ggml-model-f16.gguf"), WHOLE, KEYS | EMBEDS)
    write_ranker(place("models", "jina-reranker-v1-tiny-en/ggml-model-f16.gguf"))
    keys = next(x for x in gguf.GGUFReader(short).tensors if x.name == "blk.0.attn_k.weight")
    n_embd, n_keys = (int(n) for n in keys.shape)
    arch = gguf.GGUFReader(short).fields["general.architecture"].contents()
    tiny_gguf.write_lora(place("stories15M_MOE", "moe_shakespeare15M.gguf"), arch, n_layer, n_embd, n_keys)
    tiny_gguf.write_projector(place("tinygemma3-GGUF", "mmproj-tinygemma3-Q8_0.gguf"), n_embd)
    for seed, name in enumerate(("11_truck", "91_cat")):
        write_picture(place("tinygemma3-GGUF", f"test/{name}.png"), seed)
