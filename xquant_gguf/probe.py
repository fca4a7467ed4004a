"""A model and a text as calibration sees them: keys and values, and the KL divergence from F16 of any plan."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray

from xquant_gguf import fork
from xquant_gguf.metadata import Key, plan_file, plan_keys
from xquant_gguf.plan import Plan, Shape
from xquant_gguf.sizes import llama_cpp, set_verbose

Floats = NDArray[np.float32]


class Probe:
    """A loaded model; a context manager.  Every measurement makes a context of its own.

    n_ctx: tokens of a window; n_ubatch: tokens of a micro-batch; skip: first positions of a window that are not
    scored; stride: every how many-th of the others is.
    """

    def __init__(
        self, model_path: str, *, n_ctx: int, n_ubatch: int, skip: int, stride: int, n_threads: int | None = None
    ) -> None:
        self.model_path, self.n_ctx, self.n_ubatch = model_path, n_ctx, n_ubatch
        self.skip, self.stride, self.n_threads = skip, stride, n_threads
        set_verbose(False)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(model_path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise ValueError(f"Failed to load model from file: {model_path}")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self._vocab)
        fork.use_plan(self._model, None)
        with self._context(256) as ctx:
            self.shapes, self.layers, self.n_layers = fork.layers(ctx)
        self._f16 = self.keys(replace(Plan.from_preset("xquant", len(self.layers)), window=-1))
        self._expected: list[tuple[Floats, NDArray[np.float64]]] = []
        self._windows: list[list[int]] = []

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_model_free(self._model)

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

    def keys_and_values(self, tokens: Sequence[int]) -> Mapping[str, list[NDArray[np.float16]]]:
        """What F16 stores of a text of at most one window: {"k", "v"}: [layer of the cache] [head][token][width]."""
        with self._following(self._f16) as ctx:
            for _ in self._logits(ctx, tokens, []):
                pass

            def rows(name: str, layer: int, shape: Shape) -> NDArray[np.float16]:
                width = shape.d if name == "k" else shape.e
                return np.stack([fork.rows(ctx, layer, name, h, len(tokens), width) for h in range(shape.heads)])

            numbered = list(zip(self.layers, self.shapes, strict=True))
            return {name: [rows(name, layer, shape) for layer, shape in numbered] for name in "kv"}

    def listen(self, tokens: Sequence[int]) -> None:
        """Takes the answer of the F16 cache to a text, window by window, as the one to compare with."""
        self._windows = [list(tokens[i : i + self.n_ctx]) for i in range(0, len(tokens), self.n_ctx)]
        self._expected = []
        for window in self._windows:
            with self._following(self._f16) as ctx:
                for logits in self._logits(ctx, window, self._scored(window)):
                    logp = logits - _log_sum(logits)[:, None]
                    p = np.exp(logp)
                    self._expected.append((p, np.einsum("ij,ij->i", p, logp, dtype=np.float64)))

    def keys(self, plan: Plan, simulated: Sequence[tuple[int, str]] | None = None) -> dict[str, Key]:
        """The keys of a plan; simulated: only these (layer of the cache, "k" or "v") are quantized, in place."""
        keys = plan_keys(plan, self.layers, self.n_layers)
        if simulated is not None:
            flags = [0] * self.n_layers
            for layer, name in simulated:
                flags[self.layers[layer]] |= 1 if name == "k" else 2
            keys["xquant.simulated"] = Key(GGUFValueType.ARRAY, flags, GGUFValueType.INT32)
        return keys

    def kld(self, keys: Mapping[str, Key]) -> NDArray[np.float64]:
        """KL divergences from the F16 cache, one for each position that is scored, under the plan of these keys."""
        out, expected = [], iter(self._expected)
        for window in self._windows:
            with self._following(keys) as ctx:
                for logits in self._logits(ctx, window, self._scored(window)):
                    p, entropy = next(expected)
                    out.append(entropy - np.einsum("ij,ij->i", p, logits, dtype=np.float64) + _log_sum(logits))
        return np.concatenate(out)

    @property
    def n_scored(self) -> int:
        """Positions that are scored."""
        return sum(len(self._scored(window)) for window in self._windows)

    def _scored(self, window: Sequence[int]) -> list[int]:
        return list(range(self.skip, len(window), self.stride))

    @contextmanager
    def _following(self, keys: Mapping[str, Key]) -> Iterator[Any]:
        """A context of one window with the plan of keys."""
        with plan_file(keys) as path:
            fork.use_plan(self._model, path)
        with self._context(self.n_ctx) as ctx:
            yield ctx

    @contextmanager
    def _context(self, n_ctx: int) -> Iterator[Any]:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, self.n_ubatch, self.n_ubatch
        params.type_k = params.type_v = fork.GGML_TYPE_XQUANT
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if self.n_threads:
            params.n_threads = params.n_threads_batch = self.n_threads
        ctx = llama_cpp.llama_init_from_model(self._model, params)
        if not ctx:
            raise ValueError(f"{self.model_path}: {fork.error() or 'llama.cpp cannot make a context'}")
        try:
            yield ctx
        finally:
            llama_cpp.llama_free(ctx)

    def _logits(self, ctx: Any, tokens: Sequence[int], scored: Sequence[int]) -> Iterator[Floats]:
        """Decodes tokens; logits [position][vocabulary] of those to be scored, micro-batch by micro-batch."""
        wanted = set(scored)
        batch = llama_cpp.llama_batch_init(self.n_ubatch, 0, 1)
        try:
            for first in range(0, len(tokens), self.n_ubatch):
                chunk = tokens[first : first + self.n_ubatch]
                batch.n_tokens = len(chunk)
                for i, token in enumerate(chunk):
                    batch.token[i], batch.pos[i] = token, first + i
                    batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                    batch.logits[i] = first + i in wanted
                if llama_cpp.llama_decode(ctx, batch) != 0:
                    raise ValueError(f"{self.model_path}: llama.cpp could not decode {len(chunk)} tokens")
                n = sum(first + i in wanted for i in range(len(chunk)))
                if n:
                    pointer = ctypes.cast(llama_cpp.llama_get_logits(ctx), ctypes.POINTER(ctypes.c_float))
                    yield np.ctypeslib.as_array(pointer, (n, self.n_vocab)).copy()
        finally:
            llama_cpp.llama_batch_free(batch)


def _log_sum(logits: Floats) -> Floats:
    top = logits.max(1)
    out: Floats = top + np.log(np.exp(logits - top[:, None]).sum(1))
    return out
