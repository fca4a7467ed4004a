"""A state that Llama refuses: it says why, and Llama goes on from what the cache holds, not from what it does not."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp.llama_cache import LlamaDiskCache, LlamaRAMCache

from support import tiny_gguf
from xquant_gguf import Llama
from xquant_gguf.session import RefusedState

SIZE: dict[str, Any] = {"n_batch": 128, "n_ubatch": 128, "verbose": False, "n_threads": 1, "n_threads_batch": 1}
LETTERS = "".join(np.random.default_rng(7).choice(list("abcdefghij"), 400))
STORY, OTHER = "a story: " + LETTERS, "something else: " + LETTERS[::-1]


def answer(llm: Llama, prompt: str) -> str:
    return str(llm(prompt, max_tokens=8, temperature=0)["choices"][0]["text"])


def load(path: Path, kv_type: str, n_ctx: int = 1024, **options: Any) -> Llama:
    return Llama(str(path), kv_type=kv_type, n_ctx=n_ctx, **{**SIZE, **options})


def books(llm: Llama) -> dict[str, Any]:
    """What Llama knows beside the cache."""
    known = {"n_tokens": llm.n_tokens, "input_ids": llm.input_ids[: llm.n_tokens].tolist(), "seed": llm._seed}
    return {**known, "requires_eval": llm._requires_eval, "scores": llm.scores[: llm.n_tokens].tobytes()}


@pytest.mark.parametrize("logits_all", [False, True])
@pytest.mark.parametrize("kind", ["another plan", "another type", "cut off", "damaged", "too long"])
def test_a_refused_state_changes_nothing(paths: dict[str, Path], kind: str, logits_all: bool) -> None:
    live = load(paths["plain"], "xquant", logits_all=logits_all, seed=5)
    saved = load(
        paths["plain"], {"another plan": "xquant-small", "another type": "f16"}.get(kind, "xquant"),
        n_ctx=2048 if kind == "too long" else 1024, logits_all=logits_all, seed=6,
    )  # fmt: skip
    saved.eval(saved.tokenize((STORY * (4 if kind == "too long" else 1)).encode()))
    state = saved.save_state()
    if kind == "cut off":
        state.llama_state, state.llama_state_size = state.llama_state[:-9], state.llama_state_size - 9
    elif kind == "damaged":
        state.llama_state = state.llama_state[:16] + b"\xff" * (len(state.llama_state) - 16)
    fresh = answer(live, STORY + " and so")
    answer(live, OTHER)
    before, held = books(live), live.session.save()
    with pytest.raises(RefusedState, match=r"^the state was refused: \w"):
        live.load_state(state)
    assert books(live) == before
    assert live.session.save() == held
    assert answer(live, STORY + " and so") == fresh
    for llm in (live, saved):
        llm.close()


def test_a_cache_that_llama_cpp_emptied_is_known_to_be_empty(paths: dict[str, Path]) -> None:
    """llama.cpp clears an F16 cache before it sees that a state is cut off."""
    live = load(paths["plain"], "f16")
    fresh = answer(live, OTHER)
    state = live.save_state()
    state.llama_state, state.llama_state_size = state.llama_state[:-9], state.llama_state_size - 9
    with pytest.raises(RefusedState, match="the state was refused: "):
        live.load_state(state)
    assert live.n_tokens == live.session.length() == 0
    assert answer(live, OTHER) == fresh
    live.close()


@pytest.mark.parametrize("cache", ["RAM", "disk"])
def test_a_prompt_cache_with_a_state_that_does_not_fit_has_nothing(
    paths: dict[str, Path], tmp_path: Path, cache: str
) -> None:
    """It outlives a change of the cache's type: the answer is that of a model without it."""
    prompts = LlamaRAMCache() if cache == "RAM" else LlamaDiskCache(str(tmp_path / "prompts"))
    one, two = load(paths["plain"], "xquant-small"), load(paths["plain"], "xquant")
    fresh = answer(two, STORY + " and so")
    one.set_cache(prompts)
    one(STORY, max_tokens=1)
    answer(two, OTHER)
    two.set_cache(prompts)
    assert [answer(two, STORY + " and so") for _ in range(2)] == [fresh, fresh]
    for llm in (one, two):
        llm.close()


@pytest.mark.parametrize("logits_all", [False, True])
@pytest.mark.parametrize(("n_ctx", "n_batch"), [(2048, 128), (1024, 32), (1024, 512)])
def test_states_fit_contexts_of_another_size(
    paths: dict[str, Path], n_ctx: int, n_batch: int, logits_all: bool
) -> None:
    """F16's, whose cells do not depend on it: llama_cpp itself copies arrays of the other context's size."""
    saved = load(paths["plain"], "f16", logits_all=logits_all)
    tokens = saved.tokenize(STORY.encode())
    saved.eval(tokens)
    state = pickle.loads(pickle.dumps(saved.save_state()))
    live = load(paths["plain"], "f16", n_ctx, n_batch=n_batch, n_ubatch=n_batch, logits_all=logits_all)
    fresh = answer(live, STORY + " and so")
    answer(live, OTHER)
    live.load_state(state)
    assert live.input_ids[: live.n_tokens].tolist() == tokens
    assert len(live.input_ids) == n_ctx
    assert answer(live, STORY + " and so") == fresh
    if logits_all:
        np.testing.assert_array_equal(live.scores[: len(tokens)], saved.scores[: len(tokens)])
    for llm in (live, saved):
        llm.close()


def test_a_session_refuses_what_was_not_saved_by_it(paths: dict[str, Path]) -> None:
    """States with something behind them, too: nothing of them stays."""
    llm = load(paths["plain"], "xquant")
    llm.eval([3 + i % tiny_gguf.N_VOCAB // 2 for i in range(300)])
    state, whole = llm.session.save(0), llm.session.save()
    with pytest.raises(RefusedState, match=r"2 of its .* bytes were left over"):
        llm.session.load(state + b"xx", 0)
    assert llm.session.length() == 0
    llm.session.load(whole)
    assert llm.session.length() == 300
    with pytest.raises(RefusedState, match=r"2 of its .* bytes were left over"):
        llm.session.load(whole + b"xx")
    assert llm.session.length() == 0
    llm.close()
