"""A model and a text as calibration sees them: keys and values, and what changed ones do to the answer.

The text is decoded once with an F16 cache.  Short passages of it are decoded again, all in one micro-batch, each behind
the cells of what stands before it, whenever keys or values in these cells were replaced by what codes would give back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xquant_gguf import fork
from xquant_gguf.metadata import plan_block, plan_keys
from xquant_gguf.plan import PAGE, Plan, Shape
from xquant_gguf.sizes import llama_cpp, set_verbose

Floats = NDArray[np.float32]
Rows = NDArray[np.float16]  # [KV head][token][width]
Where = tuple[int, str]  # layer of the cache, "k" or "v"


class Probe:
    """A loaded model; a context manager.  Everything runs on the CPU."""

    def __init__(self, model_path: str, n_threads: int | None = None) -> None:
        self.model_path, self.n_threads = model_path, n_threads
        set_verbose(False)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._no_devices = (ctypes.c_void_p * 1)()
        params.devices = ctypes.addressof(self._no_devices)
        self._model = llama_cpp.llama_model_load_from_file(model_path.encode(), params)
        if not self._model:
            raise ValueError(f"Failed to load model from file: {model_path}")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self._vocab)
        with self._context(None, 2 * PAGE, 2 * PAGE) as ctx:
            self.shapes, self.layers, self.n_layers = fork.layers(ctx)
        self._f16 = replace(Plan.from_preset("xquant", len(self.layers)), window=-1)

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

    @contextmanager
    def reading(
        self, tokens: Sequence[int], n_read: int, starts: Sequence[int] = (), length: int = 0
    ) -> Iterator[Reading]:
        """The first n_read tokens of a text in an F16 cache, and passages of `length` tokens that begin at starts."""
        passages = [list(enumerate(tokens[first : first + length], first)) for first in starts]
        n_scored = len(passages) * length
        with self._context(self._f16, n_read + n_scored, max(n_scored, 2 * PAGE), len(passages) + 1) as ctx:
            yield Reading(self, ctx, tokens[:n_read], passages)

    def kld(self, plan: Plan, tokens: Sequence[int], skip: int) -> NDArray[np.float64]:
        """KL divergences from the F16 cache under a plan, in micro-batches of a page; skip: first ones not scored."""
        out: list[NDArray[np.float64]] = []
        expected: list[Expected] = []
        for followed in (self._f16, plan):
            with self._context(followed, len(tokens), PAGE) as ctx:
                for first in range(0, len(tokens), PAGE):
                    page = [(0, i, tokens[i]) for i in range(first, min(first + PAGE, len(tokens)))]
                    logits = self.decode(ctx, page, first >= skip)
                    if logits is None:
                        continue
                    if followed is self._f16:
                        expected.append(Expected(logits))
                    else:
                        out.append(expected[len(out)].kld(logits))
        return np.concatenate(out)

    def decode(self, ctx: Any, items: Sequence[tuple[int, int, int]], wanted: bool) -> Floats | None:
        """Decodes one micro-batch of (sequence, position, token); logits [token][vocabulary] of all of them, or None.

        They are valid until the next call.
        """
        batch = llama_cpp.llama_batch_init(len(items), 0, 1)
        try:
            batch.n_tokens = len(items)
            for i, (sequence, position, token) in enumerate(items):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            if llama_cpp.llama_decode(ctx, batch) != 0:
                raise ValueError(f"{self.model_path}: llama.cpp could not decode {len(items)} tokens")
        finally:
            llama_cpp.llama_batch_free(batch)
        if not wanted:
            return None
        pointer = ctypes.cast(llama_cpp.llama_get_logits(ctx), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (len(items), self.n_vocab))

    @contextmanager
    def _context(self, plan: Plan | None, n_ctx: int, n_ubatch: int, n_seq: int = 1) -> Iterator[Any]:
        """A context that follows a plan, or the default preset; its sequences share their cells."""
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_ubatch, n_ubatch
        params.n_seq_max, params.kv_unified, params.swa_full = n_seq, True, True
        params.type_k = params.type_v = fork.GGML_TYPE_XQUANT
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if self.n_threads:
            params.n_threads = params.n_threads_batch = self.n_threads
        with fork.plan_provider(lambda shapes: self._block(plan, shapes)):
            ctx = llama_cpp.llama_init_from_model(self._model, params)
        if not ctx:
            raise ValueError(f"{self.model_path}: {fork.error() or 'llama.cpp cannot make a context'}")
        try:
            yield ctx
        finally:
            llama_cpp.llama_free(ctx)

    def _block(self, plan: Plan | None, shapes: Sequence[Shape]) -> bytes:
        held = [i for i, shape in enumerate(shapes) if shape.heads > 0]
        return plan_block(plan_keys(plan or Plan.from_preset("xquant", len(held)), held, len(shapes)))


class Reading:
    """A text in an F16 cache.  rows: its keys and values, as the cache stores them."""

    def __init__(
        self, probe: Probe, ctx: Any, tokens: Sequence[int], passages: Sequence[Sequence[tuple[int, int]]]
    ) -> None:
        """passages: (position, token) of those to be scored; each is a sequence of its own behind its first cells."""
        self._probe, self._ctx, self._memory = probe, ctx, llama_cpp.llama_get_memory(ctx)
        n_ubatch = llama_cpp.llama_n_ubatch(ctx)
        for first in range(0, len(tokens), n_ubatch):
            some = enumerate(tokens[first : first + n_ubatch], first)
            probe.decode(ctx, [(0, position, token) for position, token in some], False)
        numbered = list(zip(probe.layers, probe.shapes, strict=True))
        self.rows: dict[Where, Rows] = {
            (i, name): np.stack([fork.read_rows(ctx, layer, name, h, len(tokens), width) for h in range(shape.heads)])
            for i, (layer, shape) in enumerate(numbered)
            for name, width in (("k", shape.d), ("v", shape.e))
        }
        self._passages = [[(s, *item) for item in passage] for s, passage in enumerate(passages, 1)]
        for (sequence, first, _), *_ in self._passages:
            llama_cpp.llama_memory_seq_cp(self._memory, 0, sequence, 0, first)
        self._expected = Expected(self._answer()) if passages else None

    def kld(self, changed: Mapping[Where, Rows]) -> NDArray[np.float64]:
        """KL divergences at all tokens of the passages, if the first tokens' keys and values were these."""
        assert self._expected is not None
        self._write(changed)
        try:
            return self._expected.kld(self._answer())
        finally:
            self._write({where: self.rows[where][:, : rows.shape[1]] for where, rows in changed.items()})

    def _write(self, changed: Mapping[Where, Rows]) -> None:
        for (i, name), rows in changed.items():
            for h, head in enumerate(rows):
                fork.write_rows(self._ctx, self._probe.layers[i], name, h, head)

    def _answer(self) -> Floats:
        for (sequence, first, _), *_ in self._passages:
            llama_cpp.llama_memory_seq_rm(self._memory, sequence, first, -1)
        logits = self._probe.decode(self._ctx, [item for passage in self._passages for item in passage], True)
        assert logits is not None
        return logits


class Expected:
    """What the F16 cache answers, logits [token][vocabulary]; token by token, since vocabularies are large."""

    def __init__(self, logits: Floats) -> None:
        self._p = np.empty_like(logits)
        self._entropy = np.empty(len(logits))
        for i, x in enumerate(logits):
            logp = x - _log_sum(x)
            np.exp(logp, out=self._p[i])
            self._entropy[i] = _dot(self._p[i], logp)

    def kld(self, logits: Floats) -> NDArray[np.float64]:
        """KL divergence of other logits, token by token."""
        cross = [_dot(p, x) - _log_sum(x) for p, x in zip(self._p, logits, strict=True)]
        return self._entropy - np.array(cross)


def _dot(x: Floats, y: Floats) -> float:
    return float(np.einsum("i,i->", x, y, dtype=np.float64))


def _log_sum(x: Floats) -> float:
    top = x.max()
    return float(top) + float(np.log(np.exp(x - top).sum(dtype=np.float64)))
