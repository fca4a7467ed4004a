"""Models that have no keys and values to quantize are refused at load, by one error that names the architecture."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from support import tiny_gguf
from xquant_gguf import Llama

N_EMBD, N_FF = 64, 96


def write_recurrent(path: Path) -> Path:
    """A tiny Mamba."""
    conv, inner, state, rank = 4, 128, 16, 4
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(256)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(1)
    writer.add_ssm_conv_kernel(conv)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    writer.add_layer_norm_rms_eps(1e-5)
    tiny_gguf.add_tokenizer(writer)
    shapes = {
        "token_embd.weight": (tiny_gguf.N_VOCAB, N_EMBD),
        "output_norm.weight": (N_EMBD,),
        "blk.0.attn_norm.weight": (N_EMBD,),
        "blk.0.ssm_in.weight": (2 * inner, N_EMBD),
        "blk.0.ssm_conv1d.weight": (inner, conv),
        "blk.0.ssm_conv1d.bias": (inner,),
        "blk.0.ssm_x.weight": (rank + 2 * state, inner),
        "blk.0.ssm_dt.weight": (inner, rank),
        "blk.0.ssm_dt.bias": (inner,),
        "blk.0.ssm_a": (inner, state),
        "blk.0.ssm_d": (inner,),
        "blk.0.ssm_out.weight": (N_EMBD, inner),
    }
    tiny_gguf.finish(writer, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    return path


def write_encoder(path: Path) -> Path:
    """A tiny Gemma embedding model."""
    head, n_head = 32, 2
    writer = gguf.GGUFWriter(path, "gemma-embedding")
    writer.add_context_length(256)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_block_count(1)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_sliding_window(64)
    writer.add_causal_attention(False)
    writer.add_layer_norm_rms_eps(1e-5)
    tiny_gguf.add_tokenizer(writer)
    shapes = {"token_embd.weight": (tiny_gguf.N_VOCAB, N_EMBD), "output_norm.weight": (N_EMBD,)}
    for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
        shapes[f"blk.0.{name}.weight"] = (N_EMBD,)
    for name in ("attn_q", "attn_k", "attn_v"):
        shapes[f"blk.0.{name}.weight"] = (head * n_head, N_EMBD)
    for name in ("attn_q_norm", "attn_k_norm"):
        shapes[f"blk.0.{name}.weight"] = (head,)
    shapes["blk.0.attn_output.weight"] = (N_EMBD, head * n_head)
    for name in ("ffn_gate", "ffn_up"):
        shapes[f"blk.0.{name}.weight"] = (N_FF, N_EMBD)
    shapes["blk.0.ffn_down.weight"] = (N_EMBD, N_FF)
    tiny_gguf.finish(writer, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    return path


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_recurrent, "architecture mamba cannot use it: it keeps a recurrent state .* use the cache type f16"),
        (write_encoder, "architecture gemma-embedding cannot use it: it is an encoder"),
    ],
)
def test_what_cannot_work_is_refused(write: object, message: str, tmp_path: Path) -> None:
    path = str(write(tmp_path / "model.gguf"))  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        Llama(path, kv_type="xquant", n_ctx=256, verbose=False)
    Llama(path, n_ctx=256, verbose=False, embedding="gemma" in message).close()


@pytest.mark.parametrize("width", [48, 72])
def test_head_widths(width: int, tmp_path: Path) -> None:
    shape = tiny_gguf.Shape(key_length=width, value_length=width)
    path = str(tiny_gguf.write(tmp_path / "model.gguf", shape, tiny_gguf.random_weights(shape)))
    if width % 16 == 0:
        llm = Llama(path, kv_type="xquant", n_ctx=2048, n_ubatch=128, verbose=False)
        llm.eval([5] * 700)
        # the last micro-batch began at 640, and its window at 512; page 0 is pinned
        assert llm.kv_cache_info()["pages_sealed"] == 3
        llm.close()
    else:
        with pytest.raises(ValueError, match="head width is 72, must be a multiple of 16 from 16 to 576"):
            Llama(path, kv_type="xquant", n_ctx=2048, verbose=False)
