"""A model and its contexts, through the C functions of llama.h: decoding, logits, sequences, states.

Llama, evaluate, bench, calibrate and inspect all run on this; llama_cpp.Llama knows one context of one sequence.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from xquant_gguf import fork, handover, workers
from xquant_gguf.kv_types import needs_flash_attention, number_of
from xquant_gguf.log import errors, quiet, refusal
from xquant_gguf.plan import Plan, PlanSource, Shape

Logits = NDArray[np.float32]  # [row][vocabulary]
Row = tuple[int, int, Sequence[int]]
"""A token, its position, and the sequences it belongs to."""


class DecodeError(RuntimeError):
    """llama.cpp could not decode a batch; code: what llama_decode returned."""

    def __init__(self, code: int) -> None:
        super().__init__(f"llama_decode: {code}")
        self.code = code


class RefusedState(RuntimeError, KeyError):
    """A saved state does not fit a context.

    Also a KeyError, since that is how llama_cpp's prompt caches say that they have nothing that fits.
    """

    __str__ = RuntimeError.__str__


# ---- models ----


def override_array(overrides: Mapping[str, Any]) -> Any:
    """kv_overrides as llama.cpp takes them: an array that ends with an empty key."""
    array = (llama_cpp.llama_model_kv_override * (len(overrides) + 1))()
    for entry, (key, value) in zip(array, overrides.items(), strict=False):
        entry.key = key.encode()
        if isinstance(value, bool):
            entry.tag, entry.value.val_bool = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
        elif isinstance(value, int):
            entry.tag, entry.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, value
        elif isinstance(value, float):
            entry.tag, entry.value.val_f64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_FLOAT, value
        elif isinstance(value, str) and len(value.encode()) < 128:
            entry.tag, entry.value.val_str = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
        else:
            raise ValueError(f"kv_overrides: {key} is {value!r}, must be a bool, int, float or str of under 128 bytes")
    return array


class Model:
    """A GGUF model; a context manager.

    weights: False: metadata and vocabulary alone are loaded; caches of its sessions have their true sizes, but no
    memory.  n_gpu_layers: None: GPUs are not touched.  one_gpu: all of them go to the first GPU.  overrides:
    kv_overrides.  rpc_servers: as Llama's.  Raises ValueError if the file cannot be read.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        weights: bool = True,
        n_gpu_layers: int | None = None,
        one_gpu: bool = False,
        overrides: Mapping[str, Any] | None = None,
        rpc_servers: str | Sequence[str] | None = None,
    ) -> None:
        if not Path(path).exists():
            raise ValueError(f"Model path does not exist: {path}")
        self.path = str(path)
        params = llama_cpp.llama_model_default_params()
        self._overrides = params.kv_overrides = override_array(overrides or {})
        self._no_devices = (ctypes.c_void_p * 1)()
        params.n_gpu_layers = n_gpu_layers or 0
        if one_gpu:
            params.split_mode = llama_cpp.LLAMA_SPLIT_MODE_NONE
        if rpc_servers is not None:
            self._devices = workers.devices(rpc_servers)
            params.n_gpu_layers = -1 if n_gpu_layers is None else n_gpu_layers
            params.devices = ctypes.addressof(self._devices)
        elif n_gpu_layers is None:
            params.devices = ctypes.addressof(self._no_devices)
        if not weights:
            params.no_alloc = True
            params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE  # to map the file would read all of it
        with quiet():
            llama_cpp.llama_backend_init()
            self.handle = llama_cpp.llama_model_load_from_file(self.path.encode(), params)
        if not self.handle:
            fork.cpu_variant()  # without one, nothing can be loaded
            raise ValueError(f"Failed to load model from file: {path}")
        self._vocab = llama_cpp.llama_model_get_vocab(self.handle)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model, of which no session may be open."""
        with quiet():
            llama_cpp.llama_model_free(self.handle)
        self.handle = None

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
        raise ValueError(f"{self.path}: its vocabulary cannot tokenize the text")

    @property
    def cache_plan(self) -> Plan:
        """What an XQuant cache makes of the preset xquant for this model."""
        return self._cache[0]

    @property
    def cache_layers(self) -> tuple[list[Shape], list[int], int]:
        """Shapes and model numbers of the layers in an XQuant cache, and the number of layers of the model."""
        return self._cache[1]

    @cached_property
    def _cache(self) -> tuple[Plan, tuple[list[Shape], list[int], int]]:
        with self.session("xquant", n_ctx=256, plan={}) as session:  # the plan in the file may not fit
            found = fork.plan(session.ctx, "xquant")
            assert found is not None
            return found[0], fork.layers(session.ctx)

    def session(
        self,
        kv_type: str,
        *,
        n_ctx: int,
        n_batch: int | None = None,
        n_ubatch: int = 512,
        n_seq: int = 1,
        unified: bool = True,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        flash_attn: bool | None = None,
        swa_full: bool | None = None,
        plan: PlanSource | None = None,
        moments: fork.QueryMoments | None = None,
    ) -> Session:
        """A new context, to be closed before the model.

        kv_type: as Llama's, and so is plan.  n_ctx: tokens; 0: as many as the model was trained with.  n_batch: None:
        a micro-batch's tokens.  unified: whether sequences share their cells.  n_threads_batch: for more than one
        token; None: as n_threads.  flash_attn: None: where the type needs it.  moments: what its queries are added
        up in.  Raises ValueError with llama.cpp's reason if it refuses.
        """
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx or llama_cpp.llama_model_n_ctx_train(self.handle)
        params.n_ubatch = min(params.n_ctx, n_ubatch)
        params.n_batch = n_batch or params.n_ubatch
        params.n_seq_max, params.kv_unified = n_seq, unified
        params.type_k = params.type_v = number_of(kv_type)
        flash_attn = needs_flash_attention(kv_type) if flash_attn is None else flash_attn
        on, off = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = on if flash_attn else off
        if n_threads:
            params.n_threads, params.n_threads_batch = n_threads, n_threads_batch or n_threads
        if swa_full is not None:
            params.swa_full = swa_full
        if moments is not None:
            moments.watch(params)
        with handover.following(kv_type, plan):
            return Session.make(self.handle, params, f"{self.path} with kv_type {kv_type!r}: ")


# ---- contexts ----


class _Batch:
    """Memory for a batch of llama.h, filled anew for each decode.

    width: sequences that a row may belong to.
    """

    def __init__(self, capacity: int, width: int) -> None:
        self.capacity, self.width = capacity, width
        self._token, self._position, self._n_sequences = (np.zeros(capacity, np.int32) for _ in range(3))
        self._sequences = np.zeros((capacity, width), np.int32)
        self._wanted = np.zeros(capacity, np.int8)
        rows = self._sequences.ctypes.data + self._sequences.strides[0] * np.arange(capacity)
        self._rows = rows.astype(np.uintp)  # pointers to rows of _sequences
        arrays: dict[str, NDArray[Any]] = {
            "token": self._token, "pos": self._position, "n_seq_id": self._n_sequences, "seq_id": self._rows,
            "logits": self._wanted,
        }  # fmt: skip
        kinds: dict[str, Any] = dict(llama_cpp.llama_batch._fields_)
        pointers = {name: ctypes.cast(array.ctypes.data, kinds[name]) for name, array in arrays.items()}
        self._batch = llama_cpp.llama_batch(n_tokens=0, **pointers)

    def filled(self, rows: Sequence[Row], wanted: str) -> Any:
        """The batch with these rows."""
        n = self._batch.n_tokens = len(rows)
        self._wanted[:n] = wanted == "all"
        if wanted == "last":
            self._wanted[n - 1 : n] = True
        if rows:
            self._token[:n], self._position[:n], groups = zip(*rows, strict=True)
            self._n_sequences[:n] = counts = [len(sequences) for sequences in groups]
            if min(counts) == max(counts):
                self._sequences[:n, : counts[0]] = groups
            else:
                for i, sequences in enumerate(groups):
                    self._sequences[i, : len(sequences)] = sequences
        return self._batch


class Session:
    """A context: of its own (Model.session), or one that somebody else frees, such as Llama's.

    ctx, memory: the handles of llama.h.  n_vocab: tokens of the vocabulary.
    """

    def __init__(self, model: Any, ctx: Any, *, owned: bool = False) -> None:
        self.ctx, self.memory, self._owned = ctx, llama_cpp.llama_get_memory(ctx), owned
        self._batch: _Batch | None = None
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)))

    @classmethod
    def make(cls, model: Any, params: Any, where: str = "") -> Session:
        """A new context of a loaded model with llama.h's parameters; ValueError with llama.cpp's reason if it refuses.

        where: what the message begins with.
        """
        with quiet(), errors() as said:
            ctx = llama_cpp.llama_init_from_model(model, params)
        if not ctx:
            raise ValueError(where + refusal(said))
        return cls(model, ctx, owned=True)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the context, if it is the session's own."""
        if self._owned:
            with quiet():
                llama_cpp.llama_free(self.ctx)
            self.ctx, self._owned = None, False

    @property
    def n_ctx(self) -> int:
        """Tokens that the cache has room for."""
        return int(llama_cpp.llama_n_ctx(self.ctx))

    @property
    def n_batch(self) -> int:
        """Tokens that one decode takes at most."""
        return int(llama_cpp.llama_n_batch(self.ctx))

    @property
    def n_ubatch(self) -> int:
        """Tokens of a micro-batch."""
        return int(llama_cpp.llama_n_ubatch(self.ctx))

    def decode(self, rows: Sequence[Row], wanted: Literal["all", "last", "none"] = "all") -> None:
        """Decodes one batch; wanted: the rows whose logits are kept.  DecodeError if llama.cpp cannot."""
        width = max((len(sequences) for _, _, sequences in rows), default=1)
        if self._batch is None or self._batch.capacity < len(rows) or self._batch.width < width:
            self._batch = _Batch(max(len(rows), 1), width)
        code = llama_cpp.llama_decode(self.ctx, self._batch.filled(rows, wanted))
        if code != 0:
            raise DecodeError(code)

    def logits(self, n_rows: int) -> Logits:
        """Logits of the first n_rows rows that the last decode kept; they are valid until the next one."""
        found = llama_cpp.llama_get_logits(self.ctx)
        if not found:
            raise ValueError("the last decode kept no logits")
        pointer = ctypes.cast(found, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (n_rows, self.n_vocab))

    def answer(self, tokens: Sequence[int], first: int, sequences: Sequence[int] = (0,)) -> Logits:
        """Decodes tokens at positions first, first + 1, ... and gives the logits behind each, as `logits` does."""
        self.decode([(token, first + i, sequences) for i, token in enumerate(tokens)])
        return self.logits(len(tokens))

    def wait(self) -> None:
        """Returns when all that was decoded is done."""
        llama_cpp.llama_synchronize(self.ctx)

    def clear(self) -> None:
        """Empties the cache."""
        llama_cpp.llama_memory_clear(self.memory, True)

    def remove(self, sequence: int, first: int, end: int = -1) -> bool:
        """Removes positions first to end - 1 (-1: all that follow) of a sequence; False if the cache cannot."""
        return bool(llama_cpp.llama_memory_seq_rm(self.memory, sequence, first, end))

    def copy(self, source: int, target: int, first: int = 0, end: int = -1) -> None:
        """Makes positions first to end - 1 of a sequence those of another, too."""
        llama_cpp.llama_memory_seq_cp(self.memory, source, target, first, end)

    def shift(self, sequence: int, first: int, end: int, by: int) -> None:
        """Moves positions first to end - 1 of a sequence by so many."""
        llama_cpp.llama_memory_seq_add(self.memory, sequence, first, end, by)

    def length(self, sequence: int = 0) -> int:
        """Positions up to the last one that a sequence has in the cache."""
        return int(llama_cpp.llama_memory_seq_pos_max(self.memory, sequence)) + 1 if self.memory else 0

    def save(self, sequence: int | None = None) -> bytes:
        """The state of the whole context, or of one sequence; RuntimeError with llama.cpp's reason if it cannot."""
        of = () if sequence is None else (sequence,)
        name = "llama_state" if sequence is None else "llama_state_seq"
        with errors() as said:
            size = getattr(llama_cpp, f"{name}_get_size")(self.ctx, *of)
            data = (ctypes.c_uint8 * size)()
            written = getattr(llama_cpp, f"{name}_get_data")(self.ctx, data, size, *of) if size else 0
        if written == 0:
            raise RuntimeError(f"the state cannot be saved: {'; '.join(said) or 'llama.cpp does not say why'}")
        return bytes(memoryview(data)[:written])

    def load(self, state: bytes, sequence: int | None = None) -> None:
        """Puts back what save gave; RefusedState with llama.cpp's reason if it does not fit.

        A state with more behind it than llama.cpp reads is not one of ours: what it read of it is removed again.
        """
        of = () if sequence is None else (sequence,)
        name = "llama_state" if sequence is None else "llama_state_seq"
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        with errors() as said:
            read = getattr(llama_cpp, f"{name}_set_data")(self.ctx, data, len(state), *of)
        if 0 < read < len(state):
            said.append(f"{len(state) - read} of its {len(state)} bytes were left over")
            if sequence is None:
                self.clear()
            else:
                self.remove(sequence, 0)
        if read != len(state):
            reason = "; ".join(line.rpartition("error loading state: ")[2] for line in said)
            raise RefusedState(f"the state was refused: {reason or 'llama.cpp does not say why'}")
