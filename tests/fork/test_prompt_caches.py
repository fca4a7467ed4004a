"""Llama with saved states and prompt caches: what a state cannot give, the object does not believe to have.

llama_cpp keeps books of its own (n_tokens, input_ids) of what lies in the cache, and takes a prompt's first tokens from
there. If they tell of tokens that the cache does not hold, the answer is to another text, and nothing says so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp.llama import LlamaState
from llama_cpp.llama_cache import LlamaDiskCache, LlamaRAMCache

from support import tiny_gguf
from support.contexts import Logits, difference, llama_cpp
from xquant_gguf import Llama

STORY, OTHER, LONG = tiny_gguf.text(400, 1), tiny_gguf.text(450, 2), tiny_gguf.text(900, 3)
QUESTION = STORY + tiny_gguf.text(60, 4)
SAME = 4e-3  # as in test_state_exchange.py


@pytest.fixture
def path(paths: dict[str, Path]) -> str:
    return str(paths["plain"])


def made(path: str, kv_type: str, n_ctx: int) -> Llama:
    sizes: dict[str, Any] = {"n_ctx": n_ctx, "n_batch": 128, "n_ubatch": 128, "n_threads": 1, "n_threads_batch": 1}
    return Llama(path, kv_type=kv_type, verbose=False, **sizes)


def ask(llm: Llama, prompt: str) -> Logits:
    """Logits behind a prompt, by the way of create_completion with all its caches."""
    llm(prompt, max_tokens=1, temperature=0.0)
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),)).copy()


def agree(llm: Llama) -> bool:
    """The object's books tell of as many tokens as the cache holds."""
    return bool(llm.n_tokens == llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(llm.ctx), 0) + 1)


def saved(path: str, kv_type: str, n_ctx: int, prompt: str) -> LlamaState:
    """The state of an object of its own that was told a prompt."""
    llm = made(path, kv_type, n_ctx)
    ask(llm, prompt)
    state = llm.save_state()
    llm.close()
    return state


def cut(state: LlamaState) -> LlamaState:
    data = state.llama_state[: len(state.llama_state) // 2]
    return LlamaState(state.input_ids, state.scores, state.n_tokens, data, len(data), state.seed)


@pytest.mark.parametrize("kv_type", ["f16", "xquant"])
def test_a_state_of_another_n_ctx_is_loaded(path: str, kv_type: str) -> None:
    llm = made(path, kv_type, 2048)
    want = ask(llm, QUESTION)
    llm.reset()
    ask(llm, OTHER)
    llm.load_state(saved(path, kv_type, 512, STORY))
    assert agree(llm)
    assert difference(ask(llm, QUESTION), want) < SAME
    llm.close()


@pytest.mark.parametrize("kv_type", ["f16", "xquant"])
def test_what_loaded_a_smaller_state_has_its_own_room(path: str, kv_type: str) -> None:
    llm = made(path, kv_type, 2048)
    llm.load_state(saved(path, kv_type, 512, STORY))
    assert np.isfinite(ask(llm, STORY + LONG)).all()
    llm.close()


REFUSED: dict[str, Callable[[str, str], LlamaState]] = {
    "cut off": lambda path, kv_type: cut(saved(path, kv_type, 512, STORY)),
    "of another type": lambda path, _: saved(path, "q8_0", 512, STORY),
    "too long": lambda path, kv_type: saved(path, kv_type, 2048, LONG),
}


@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.parametrize("kv_type", ["f16", "xquant"])
def test_a_refused_state_leaves_no_tokens_that_are_not_there(path: str, kv_type: str, reason: str) -> None:
    llm = made(path, kv_type, 512)
    want = ask(llm, QUESTION)
    llm.reset()
    ask(llm, OTHER)
    with pytest.raises(RuntimeError):
        llm.load_state(REFUSED[reason](path, kv_type))
    assert agree(llm)
    assert difference(ask(llm, QUESTION), want) < SAME
    llm.close()


@pytest.mark.parametrize("kind", ["memory", "disk"])
@pytest.mark.parametrize("kv_type", ["f16", "xquant"])
def test_a_prompt_cache_outlives_a_change_of_n_ctx(path: str, kv_type: str, kind: str, tmp_path: Path) -> None:
    """Whoever changes n_ctx keeps the cache's folder: the first request, and the next, are answered as without it."""
    cache = LlamaRAMCache() if kind == "memory" else LlamaDiskCache(str(tmp_path))
    small, large = made(path, kv_type, 512), made(path, kv_type, 2048)
    small.set_cache(cache)
    ask(small, STORY)
    want = ask(large, QUESTION)
    large.reset()
    ask(large, OTHER)
    large.set_cache(cache)
    for _ in range(2):
        assert difference(ask(large, QUESTION), want) < SAME
    small.close()
    large.close()
