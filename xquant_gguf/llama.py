"""Llama: llama_cpp.Llama with a choice of KV cache."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any, Literal

import llama_cpp

from xquant_gguf import codec, handover, workers
from xquant_gguf.arguments import LlamaOptions, check_names, check_numbers
from xquant_gguf.inspect import CacheInfo
from xquant_gguf.kv_types import LLAMA_TYPES, checked_kv_type, needs_flash_attention, number_of, warning_of
from xquant_gguf.log import errors, explained
from xquant_gguf.plan import PlanSource
from xquant_gguf.session import RefusedState, Session

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from typing_extensions import Self, Unpack


class Llama(llama_cpp.Llama):
    """llama_cpp.Llama with kv_type and kv_plan; everything else is as it is there, but that unknown arguments and
    states that do not fit are errors which leave everything as it was."""

    _made = False
    """Whether there is something to close."""
    _devices: Any = None
    """Those of workers and of this machine; None: llama.cpp's choice of this machine's."""

    def __init__(
        self,
        model_path: str,
        *,
        kv_type: str | None = None,
        kv_plan: PlanSource | None = None,
        rpc_servers: str | Sequence[str] | None = None,
        **options: Unpack[LlamaOptions],
    ) -> None:
        """Loads a GGUF model.

        kv_type: "xquant" or another preset (xquant-small, xquant-tiny, xquant-paper, xquant-paper-128), or one of
        llama.cpp's own types (f16, q8_0, q4_0, ...); None: llama.cpp's default.  kv_plan: what each layer stores, as a
        Plan, a dictionary or a JSON file; implies XQuant.  Quantized caches turn flash attention on.  rpc_servers:
        workers (docs/several-machines.md) as host:port, several with commas or as a list, which take layers and their
        cache like GPUs, before those of this machine; n_gpu_layers is then -1, unless it is given.

        Raises TypeError if an argument is unknown, ValueError if arguments contradict each other, or the model cannot
        have such a cache.
        """
        check_names(options)
        check_numbers(options)
        model_path = os.fspath(model_path)
        self._kv_type = checked_kv_type(kv_type, kv_plan, options)
        self._kv_plan = kv_plan
        self._rpc_servers = rpc_servers
        if rpc_servers is not None:
            self._devices = workers.devices(rpc_servers)
            options.setdefault("n_gpu_layers", -1)
        if self._kv_type is not None:
            options["type_k"] = options["type_v"] = number_of(self._kv_type)
            if needs_flash_attention(self._kv_type):
                options["flash_attn"] = True
        with handover.following(self._kv_type, kv_plan):
            self._load(model_path, options)
        name = self._kv_type or "xquant"
        self._cache = CacheInfo(self.ctx, name, (self.context_params.type_k, self.context_params.type_v))
        info = self.kv_cache_info()
        if self.verbose:
            print(f"xquant_gguf: {info}", file=sys.stderr)
        if self.is_xquant and not options.get("vocab_only") and (text := warning_of(info)):
            warnings.warn(text, stacklevel=2)

    @property
    def model_params(self) -> Any:
        """What llama_cpp loads the model with, and the devices of workers."""
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        self._model_params = params
        if self._devices is not None:
            params.devices = ctypes.addressof(self._devices)

    def _load(self, model_path: str, options: LlamaOptions) -> None:
        self._made = True
        with explained(f"{model_path} with kv_type {self._kv_type!r}", self.is_xquant):
            super().__init__(model_path, **options)

    @property
    def is_xquant(self) -> bool:
        """Whether the cache is an XQuant one."""
        return self._kv_type is not None and self._kv_type not in LLAMA_TYPES

    @property
    def session(self) -> Session:
        """The context, for what llama_cpp does not offer: sequences, logits, states; it stays Llama's own."""
        if not self._made or self.ctx is None:
            raise ValueError(f"{self.model_path} was closed")
        return Session(self.model, self.ctx)

    def kv_cache_info(self) -> dict[str, Any]:
        """What the KV cache stores and how much memory it takes.

        preset; k_bits, v_bits: bits of codes per layer, v_bits None where values are part of the keys (MLA);
        equivalent_bits: code bits per value, borrowed codes counted 0
        (arXiv 2510.11236); true_bits: bits per value of sealed tokens, everything counted; bytes_allocated;
        bytes_used: of these, what holds tokens now; pages_open, pages_sealed: pages in F16 or bytes, and in codes;
        pages_bytes: of the open ones, those in bytes; kernels: the kernel set in force; llama_kernels: llama.cpp's
        own on the CPU; expected_kld: the KL divergence from F16 that calibration measured.  For sliding-window models
        the F16 cache of sliding layers, and states of recurrent ones, are in the bytes, and in bytes_other.
        """
        if self.ctx is None:
            raise ValueError(f"{self.model_path} was closed")
        return self._cache.now(self.n_tokens)

    @staticmethod
    def kernels() -> str:
        """Name of the kernel set in force."""
        return codec.kernels()

    # ---- what llama_cpp does, with errors that leave everything as it was ----

    def generate(self, tokens: Sequence[int], *args: Any, **options: Any) -> Iterator[Any]:
        """As llama_cpp's; ValueError if a grammar cannot be parsed, which would end the process there."""
        if (grammar := options.get("grammar")) is not None:
            self.check_grammar(grammar)
        return super().generate(tokens, *args, **options)

    def eval(self, tokens: Sequence[int]) -> None:
        """As llama_cpp's; RuntimeError with llama.cpp's reason, such as a worker that is lost."""
        with errors() as said:
            try:
                super().eval(tokens)
            except RuntimeError as error:
                raise RuntimeError(f"{error}: {'; '.join(said)}" if said else str(error)) from error

    def check_grammar(self, grammar: llama_cpp.LlamaGrammar) -> None:
        """ValueError if llama.cpp cannot parse a grammar."""
        text, root = grammar._grammar, grammar._root
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        sampler = llama_cpp.llama_sampler_init_grammar(vocab, text.encode(), root.encode())
        if not sampler:
            raise ValueError(f"the grammar cannot be parsed, or has no rule {root!r}: {text[:200]!r}")
        llama_cpp.llama_sampler_free(sampler)

    def save_state(self) -> llama_cpp.LlamaState:
        """The context's state and what Llama knows of it; RuntimeError with llama.cpp's reason if it cannot be had."""
        with errors() as said:
            state = super().save_state()
        if state.llama_state_size == 0:
            raise RuntimeError(f"the state cannot be saved: {'; '.join(said) or 'llama.cpp does not say why'}")
        return state

    def load_state(self, state: llama_cpp.LlamaState) -> None:
        """Puts a saved state back, also one of another n_ctx or n_batch.

        RefusedState, a RuntimeError, says why a state does not fit; then the object is as it was before, or empty if
        llama.cpp has emptied the cache.
        """
        n = int(state.n_tokens)
        if n > len(self.input_ids):
            raise RefusedState(f"the state was refused: it has {n} tokens, this context {len(self.input_ids)}")
        session = self.session
        length = session.length()
        try:
            session.load(state.llama_state[: state.llama_state_size])
        except RefusedState as error:
            if session.length() != length:
                self.reset()
            if self.verbose:  # llama_cpp's prompt caches do not tell of it
                print(f"xquant_gguf: {error}", file=sys.stderr)
            raise
        self.input_ids[:n] = state.input_ids[:n]
        self.n_tokens = n
        self._requires_eval = True  # logits are not part of a state
        self.set_seed(state.seed)
        if self.scores.shape[1:] == state.scores.shape[1:]:
            rows = min(n, len(self.scores), len(state.scores))
            self.scores[:rows] = state.scores[:rows]

    def close(self) -> None:
        """Frees model and context."""
        if self._made:
            super().close()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        if self._kv_type is not None:
            del state["type_k"], state["type_v"]
            if self.is_xquant:
                del state["flash_attn"]
            state.update(kv_type=self._kv_type, kv_plan=self._kv_plan)
        if self._rpc_servers is not None:
            state["rpc_servers"] = self._rpc_servers
        return state

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str | None,
        additional_files: list[str] | None = None,
        local_dir: str | os.PathLike[str] | None = None,
        local_dir_use_symlinks: bool | Literal["auto"] = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        *,
        kv_type: str | None = None,
        kv_plan: PlanSource | None = None,
        rpc_servers: str | Sequence[str] | None = None,
        **options: Unpack[LlamaOptions],
    ) -> Self:
        """Loads a model from the Hugging Face hub, with the package huggingface-hub.

        filename: a name or pattern that one file in the repository has.  The rest is as in llama_cpp and in Llama.
        """
        check_names(options)  # before a download, not after it
        check_numbers(options)
        checked_kv_type(kv_type, kv_plan, options)
        made: Self = super().from_pretrained(
            repo_id, filename, additional_files, local_dir, local_dir_use_symlinks, cache_dir,
            kv_type=kv_type, kv_plan=kv_plan, rpc_servers=rpc_servers, **options,
        )  # fmt: skip
        return made


__all__ = ["LLAMA_TYPES", "Llama", "RefusedState", "llama_cpp"]
