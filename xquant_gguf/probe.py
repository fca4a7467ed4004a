"""A model and a text as calibration sees them: keys, values and queries, and what changed keys or values do.

The text's first tokens are decoded once with an F16 cache.  A measurement replaces some of their keys and values by
what sealed pages would give back, decodes the last tokens again and compares the answers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xquant_gguf import fork
from xquant_gguf.metadata import plan_file, plan_keys
from xquant_gguf.plan import Plan
from xquant_gguf.sizes import llama_cpp, set_verbose

Rows = NDArray[np.float16]  # [KV head][token][width]
Floats = NDArray[np.float32]
Where = tuple[int, str]  # layer of the cache, "k" or "v"

UBATCH = 512


@dataclass(frozen=True)
class Seen:
    """A passage: keys and values of all its tokens, and each layer's queries of the scored ones, as the model has them.

    queries [layer] -> [scored token][head][width]: times the scale of scores.
    """

    rows: Mapping[Where, Rows]
    queries: Sequence[Floats]
    n_prefix: int

    def prefix(self, layer: int, name: str) -> Rows:
        """Keys or values of the tokens before the scored ones."""
        return self.rows[layer, name][:, : self.n_prefix]


class Probe:
    """A loaded model and one context; a context manager.  n_ctx: tokens that it holds."""

    def __init__(self, model_path: str, *, n_ctx: int, n_threads: int | None = None) -> None:
        self.model_path, self.n_ctx = model_path, n_ctx
        set_verbose(False)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._no_devices = (ctypes.c_void_p * 1)()
        params.devices = ctypes.addressof(self._no_devices)
        self._model = llama_cpp.llama_model_load_from_file(model_path.encode(), params)
        if not self._model:
            raise ValueError(f"Failed to load model from file: {model_path}")
        self._ctx = None
        try:
            self._open(n_threads)
        except BaseException:
            self.close()
            raise
        self.rows: dict[Where, Rows] = {}
        """Keys and values of all tokens, as F16 stores them."""
        self.n_prefix = 0
        self._scored: list[int] = []
        self._expected: tuple[Floats, NDArray[np.float64]] | None = None

    def _open(self, n_threads: int | None) -> None:
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self._vocab)
        fork.use_plan(self._model, None)
        ctx = self._context(256, n_threads)
        self.shapes, self.layers, self.n_layers = fork.layers(ctx)
        llama_cpp.llama_free(ctx)
        never = replace(Plan.from_preset("xquant", len(self.layers)), window=-1)
        with plan_file(plan_keys(never, self.layers, self.n_layers)) as path:
            fork.use_plan(self._model, path)
        self._ctx = self._context(self.n_ctx, n_threads)
        self._batch = llama_cpp.llama_batch_init(UBATCH, 0, 1)

    def _context(self, n_ctx: int, n_threads: int | None) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, min(UBATCH, n_ctx), min(UBATCH, n_ctx)
        params.type_k = params.type_v = fork.GGML_TYPE_XQUANT
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.swa_full = True
        if n_threads:
            params.n_threads = params.n_threads_batch = n_threads
        ctx = llama_cpp.llama_init_from_model(self._model, params)
        if not ctx:
            raise ValueError(f"{self.model_path}: {fork.error() or 'llama.cpp cannot make a context'}")
        return ctx

    def close(self) -> None:
        """Frees context and model."""
        if self._ctx:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self._ctx)
        if self._model:
            llama_cpp.llama_model_free(self._model)
        self._ctx = self._model = None

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text, without special ones."""
        raw = text.encode()
        n = len(raw)
        for _ in range(2):  # a negative answer is the room that it needs
            out = (llama_cpp.llama_token * max(n, 1))()
            n = llama_cpp.llama_tokenize(self._vocab, raw, len(raw), out, len(out), False, False)
            if n >= 0:
                return list(out[:n])
            n = -n
        raise ValueError(f"{self.model_path}: its vocabulary cannot tokenize the text")

    def read(self, prefix: Sequence[int], scored: Sequence[int]) -> Seen:
        """Decodes prefix, then scored (at most one micro-batch), and keeps what F16 stores and answers."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._ctx), True)
        self.n_prefix, self._scored = len(prefix), list(scored)
        for first in range(0, len(prefix), UBATCH):
            self._decode(prefix[first : first + UBATCH], first, False)
        fork.queries(self._ctx, self.layers[0])  # from now on they are kept
        logits = self._answer()
        numbered = list(zip(self.layers, self.shapes, strict=True))
        n = len(prefix) + len(scored)
        self.queries = [fork.queries(self._ctx, layer).reshape(len(scored), -1, shape.d) for layer, shape in numbered]
        self.rows = {
            (i, name): np.stack(
                [
                    fork.read_rows(self._ctx, layer, name, h, n, shape.d if name == "k" else shape.e)
                    for h in range(shape.heads)
                ]
            )
            for i, (layer, shape) in enumerate(numbered)
            for name in "kv"
        }
        logp = logits - _log_sum(logits)[:, None]
        p = np.exp(logp)
        self._expected = p, np.einsum("ij,ij->i", p, logp, dtype=np.float64)
        return Seen(self.rows, self.queries, self.n_prefix)

    def kld(self, changed: Mapping[Where, Rows]) -> NDArray[np.float64]:
        """KL divergences from F16 at the scored tokens, if the first tokens' keys and values were these."""
        assert self._expected is not None
        self._write(changed)
        try:
            logits = self._answer()
        finally:
            self._write({where: self.rows[where][:, : rows.shape[1]] for where, rows in changed.items()})
        p, entropy = self._expected
        return entropy - np.einsum("ij,ij->i", p, logits, dtype=np.float64) + _log_sum(logits)

    def _write(self, changed: Mapping[Where, Rows]) -> None:
        for (i, name), rows in changed.items():
            for h, head in enumerate(rows):
                fork.write_rows(self._ctx, self.layers[i], name, h, head)

    def _answer(self) -> Floats:
        """Logits [token][vocabulary] of the scored tokens."""
        memory = llama_cpp.llama_get_memory(self._ctx)
        llama_cpp.llama_memory_seq_rm(memory, 0, self.n_prefix, -1)
        self._decode(self._scored, self.n_prefix, True)
        pointer = ctypes.cast(llama_cpp.llama_get_logits(self._ctx), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (len(self._scored), self.n_vocab))

    def _decode(self, tokens: Sequence[int], first: int, logits: bool) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, first + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = logits
        if llama_cpp.llama_decode(self._ctx, batch) != 0:
            raise ValueError(f"{self.model_path}: llama.cpp could not decode {len(tokens)} tokens")


def _log_sum(logits: Floats) -> Floats:
    top = logits.max(1)
    out: Floats = top + np.log(np.exp(logits - top[:, None]).sum(1))
    return out
