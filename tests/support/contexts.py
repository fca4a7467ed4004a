"""A llama.cpp context through the low-level bindings, for what Llama does not expose: sequences, streams, state."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xquant_gguf import fork
from xquant_gguf.llama import llama_cpp
from xquant_gguf.metadata import plan_block, plan_keys
from xquant_gguf.plan import Plan, Shape
from xquant_gguf.sizes import override_array

__all__ = ["TYPES", "Context", "Logits", "llama_cpp"]

Logits = NDArray[np.float32]
TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}


def block_of(plan: Mapping[str, Any], preset: str, shapes: Sequence[Shape]) -> bytes:
    """A plan that starts from a preset, as a provider gives it."""
    held = [i for i, shape in enumerate(shapes) if shape.heads > 0]
    return plan_block(plan_keys(Plan.load(plan, len(held), preset), held, len(shapes)))


class Context:
    """One model and one context.

    kv_type: f16, q8_0, q4_0 or an XQuant preset.  For XQuant, overrides: kv_overrides beside it; plan: as kv_plan.
    """

    def __init__(
        self,
        path: Path,
        kv_type: str,
        *,
        n_ctx: int = 2048,
        n_ubatch: int = 128,
        n_seq: int = 1,
        unified: bool = True,
        n_gpu_layers: int = 0,
        overrides: Mapping[str, int | str] | None = None,
        plan: Mapping[str, Any] | None = None,
    ) -> None:
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = n_gpu_layers
        if kv_type not in TYPES:
            self.overrides = override_array({"xquant.preset": kv_type, **(overrides or {})})
            model.kv_overrides = self.overrides
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, n_ctx, n_ubatch, n_seq
        params.kv_unified = unified
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = TYPES.get(kv_type, fork.GGML_TYPE_XQUANT)
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        with contextlib.ExitStack() as stack:
            if plan is not None and kv_type not in TYPES:
                stack.enter_context(fork.plan_provider(lambda shapes: block_of(plan, kv_type, shapes)))
            self.ctx = llama_cpp.llama_init_from_model(self.model, params)
        if not self.ctx:
            raise ValueError(fork.error())
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def close(self) -> None:
        llama_cpp.llama_free(self.ctx)
        llama_cpp.llama_model_free(self.model)

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def decode(self, tokens: Sequence[int], first: int, sequences: Sequence[int] = (0,)) -> Logits:
        """Logits [token][vocabulary] of tokens at positions first, first + 1, ... in the given sequences."""
        return self.decode_mixed([(t, first + i, sequences) for i, t in enumerate(tokens)])

    def decode_embeddings(self, rows: NDArray[np.float32], first: int) -> Logits:
        """As decode, of input embeddings [token][width] in sequence 0: what stands for an image in a prompt."""
        batch = llama_cpp.llama_batch_init(len(rows), rows.shape[1], 1)
        try:
            batch.n_tokens = len(rows)
            ctypes.memmove(batch.embd, np.ascontiguousarray(rows, np.float32).ctypes.data, rows.size * 4)
            for i in range(len(rows)):
                batch.pos[i], batch.logits[i], batch.n_seq_id[i] = first + i, 1, 1
                batch.seq_id[i][0] = 0
            self._decode(batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        return self._logits(len(rows))

    def decode_mixed(self, rows: Sequence[tuple[int, int, Sequence[int]]]) -> Logits:
        """Logits of (token, position, sequences) rows in one batch; RuntimeError with llama_decode's code."""
        self.feed(rows)
        return self._logits(len(rows))

    def feed(self, rows: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """The same without waiting for the logits."""
        batch = llama_cpp.llama_batch_init(len(rows), 0, max(len(s) for _, _, s in rows))
        try:
            batch.n_tokens = len(rows)
            for i, (token, position, sequences) in enumerate(rows):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, 1
                batch.n_seq_id[i] = len(sequences)
                for j, s in enumerate(sequences):
                    batch.seq_id[i][j] = s
            self._decode(batch)
        finally:
            llama_cpp.llama_batch_free(batch)

    def _decode(self, batch: Any) -> None:
        code = llama_cpp.llama_decode(self.ctx, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode: {code}")

    def _logits(self, n_rows: int) -> Logits:
        n = n_rows * self.n_vocab
        pointer = ctypes.cast(llama_cpp.llama_get_logits(self.ctx), ctypes.POINTER(ctypes.c_float * n))
        return np.frombuffer(pointer.contents, np.float32).reshape(n_rows, -1).copy()

    def save(self, sequence: int | None = None) -> bytes:
        """The state of everything, or of one sequence."""
        get = llama_cpp.llama_state_get_data if sequence is None else llama_cpp.llama_state_seq_get_data
        size = llama_cpp.llama_state_get_size(self.ctx) if sequence is None else 0
        size = size or llama_cpp.llama_state_seq_get_size(self.ctx, sequence)
        data = (ctypes.c_uint8 * size)()
        written = get(self.ctx, data, size, *(() if sequence is None else (sequence,)))
        return bytes(data[:written])

    def load(self, state: bytes, sequence: int | None = None) -> int:
        """Bytes read; 0 if the state was refused."""
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if sequence is None:
            return int(llama_cpp.llama_state_set_data(self.ctx, data, len(state)))
        return int(llama_cpp.llama_state_seq_set_data(self.ctx, data, len(state), sequence))

    def pages(self, stream: int = 0) -> dict[int, fork.Page]:
        """The pages of an XQuant cache that have cells, by number."""
        return {i: page for i, page in enumerate(fork.pages(self.ctx, stream)) if page.n_cells > 0}

    def info(self) -> dict[str, int]:
        out = fork.info(self.ctx)
        assert out is not None
        return out
