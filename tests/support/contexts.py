"""A llama.cpp context through the low-level bindings, for what Llama does not expose: sequences, streams, state."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from xquant_gguf import fork
from xquant_gguf.kv_types import LLAMA_TYPES
from xquant_gguf.plan import PlanSource
from xquant_gguf.session import Logits, Model, RefusedState, Row

__all__ = ["Abort", "Context", "Logits", "difference", "last_logits", "llama_cpp"]


def last_logits(llm: llama_cpp.Llama) -> Logits:
    return np.array(llm.scores[llm.n_tokens - 1])


def difference(got: Logits, want: Logits) -> float:
    """In standard deviations, on average."""
    return float(np.abs(got - want).mean() / want.std())


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
        rpc_servers: str | Sequence[str] | None = None,
        overrides: Mapping[str, int | str] | None = None,
        plan: PlanSource | None = None,
    ) -> None:
        layers = n_gpu_layers if rpc_servers is None else None
        self._model = Model(path, n_gpu_layers=layers, overrides=overrides, rpc_servers=rpc_servers)
        self.session = self._model.session(
            kv_type, n_ctx=n_ctx, n_batch=n_ctx, n_ubatch=n_ubatch, n_seq=n_seq, unified=unified, n_threads=1,
            flash_attn=True, plan=None if kv_type in LLAMA_TYPES else (plan or {}),
        )  # fmt: skip
        self.model, self.ctx, self.memory = self._model.handle, self.session.ctx, self.session.memory
        self.n_vocab = self.session.n_vocab

    def close(self) -> None:
        self.session.close()
        self._model.close()

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def decode(self, tokens: Sequence[int], first: int, sequences: Sequence[int] = (0,)) -> Logits:
        """Logits [token][vocabulary] of tokens at positions first, first + 1, ... in the given sequences."""
        return self.session.answer(tokens, first, sequences).copy()

    def decode_embeddings(self, rows: NDArray[np.float32], first: int) -> Logits:
        """As decode, of input embeddings [token][width] in sequence 0: what stands for an image in a prompt."""
        batch = llama_cpp.llama_batch_init(len(rows), rows.shape[1], 1)
        try:
            batch.n_tokens = len(rows)
            ctypes.memmove(batch.embd, np.ascontiguousarray(rows, np.float32).ctypes.data, rows.size * 4)
            for i in range(len(rows)):
                batch.pos[i], batch.logits[i], batch.n_seq_id[i] = first + i, 1, 1
                batch.seq_id[i][0] = 0
            assert llama_cpp.llama_decode(self.ctx, batch) == 0
        finally:
            llama_cpp.llama_batch_free(batch)
        return self.session.logits(len(rows)).copy()

    def decode_mixed(self, rows: Sequence[Row]) -> Logits:
        """Logits of (token, position, sequences) rows in one batch; RuntimeError with llama_decode's code."""
        self.session.decode(rows)
        return self.session.logits(len(rows)).copy()

    def feed(self, rows: Sequence[Row]) -> None:
        """The same without waiting for the logits."""
        self.session.decode(rows)

    def save(self, sequence: int | None = None) -> bytes:
        """The state of everything, or of one sequence."""
        return self.session.save(sequence)

    def load(self, state: bytes, sequence: int | None = None) -> int:
        """Bytes read; 0 if the state was refused."""
        try:
            self.session.load(state, sequence)
        except RefusedState:
            return 0
        return len(state)

    def pages(self, stream: int = 0) -> dict[int, fork.Page]:
        """The pages of an XQuant cache that have cells, by number."""
        return {i: page for i, page in enumerate(fork.pages(self.ctx, stream)) if page.n_cells > 0}

    def info(self) -> dict[str, int]:
        out = fork.info(self.ctx)
        assert out is not None
        return out


class Abort:
    """A context's abort callback, which llama.cpp asks between two nodes of a graph."""

    def __init__(self, context: Context) -> None:
        self.asked, self.limit = 0, 1 << 62
        self.callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(self.answer)
        llama_cpp.llama_set_abort_callback(context.ctx, self.callback, None)

    def answer(self, _: int) -> bool:
        self.asked += 1
        return self.asked > self.limit
