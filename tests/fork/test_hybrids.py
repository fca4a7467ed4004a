"""Models that mix attention with recurrent layers: rollback, refused states and sequences, as with an F16 cache."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import Phase, given, settings

from support import upstream
from support.contexts import llama_cpp
from support.models import error
from xquant_gguf.kv_types import number_of
from xquant_gguf.session import Model, RefusedState, Session

# a kind each of recurrent layers that llama.cpp can roll back: delta net, Mamba2, convolution beside sliding attention
NAMES = ("qwen35-dense", "nemotron_h-dense", "lfm2-dense")
N_ROLLBACK = 4
TOKENS = np.random.default_rng(5).integers(3, 100, 1000).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hybrids")
    upstream.make_models(out, NAMES)
    return out


@pytest.fixture(scope="module", params=NAMES)
def model(folder: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    with Model(folder / f"{request.param}.gguf", n_gpu_layers=0) as model:
        yield model


def made(model: Model, kv_type: str, n_seq: int = 1, window: int | None = None) -> Session:
    params: Any = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max, params.kv_unified = 2048, 512, 64, n_seq, True
    params.n_rs_seq, params.n_threads, params.n_threads_batch = N_ROLLBACK, 1, 1
    params.type_k = params.type_v = number_of(kv_type)
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    return Session.make(model.handle, params)


# Squared error over the variance: pages may be sealed a few tokens earlier where drafts were removed again.
SAME = {"f16": 1e-4, "xquant": 1e-3}


@pytest.mark.parametrize("kv_type", ["f16", "xquant"])
@given(drafts=st.lists(st.tuples(st.integers(1, N_ROLLBACK), st.integers(0, N_ROLLBACK)), min_size=30, max_size=60))
@settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])
def test_drafts_that_are_rolled_back_leave_nothing(model: Model, kv_type: str, drafts: list[tuple[int, int]]) -> None:
    """Speculative decoding over the borders of pages: a token, a few drafts, of which some are wrong and removed."""
    start, wrong = 350, 7
    with made(model, kv_type) as plain, made(model, kv_type) as drafting:
        for session in (plain, drafting):
            session.answer(TOKENS[:start], 0)
        end = start
        for n_drafts, n_right in drafts:
            right = min(n_right, n_drafts)
            batch = TOKENS[end : end + 1 + right] + [wrong] * (n_drafts - right)
            got = drafting.answer(batch, end)[: 1 + right].copy()
            if n_drafts > right:
                assert drafting.remove(0, end + 1 + right)
            want = np.concatenate([plain.answer([token], end + i).copy() for i, token in enumerate(batch[: 1 + right])])
            assert error(got, want) < SAME[kv_type]
            end += 1 + right
        assert plain.length() == drafting.length() == end


@pytest.mark.parametrize("sequence", [None, 0])
def test_a_refused_state_changes_nothing(model: Model, sequence: int | None) -> None:
    """Wherever it is cut off: in what belongs to attention, or to recurrent layers (there F16 loses what it had)."""
    with made(model, "xquant", 2) as saved, made(model, "xquant", 2) as live, made(model, "xquant", 2) as twin:
        saved.answer(TOKENS[:450], 0, [0])
        state = saved.save(sequence)
        for session in (live, twin):
            session.answer(TOKENS[450:800], 0, [0])
            session.answer(TOKENS[100:140], 0, [1])
        for cut in (20, len(state) // 3, len(state) - 2000, len(state) - 1):
            with pytest.raises(RefusedState):
                live.load(state[:cut], sequence)
        assert live.save(1) == twin.save(1)
        for s, first, end in ((0, 350, 800), (1, 40, 140)):
            got, want = (session.answer(TOKENS[end : end + 20], first, [s]).copy() for session in (live, twin))
            assert error(got, want) < 1e-6  # cells of sliding layers may have changed places
        live.load(state, sequence)
        got, want = (session.answer(TOKENS[450:470], 450, [0]).copy() for session in (live, saved))
        assert error(got, want) < 1e-4


def test_a_refused_part_of_a_state_changes_nothing(model: Model) -> None:
    """Of recurrent layers alone, and of sliding ones, as rollback saves it: attention keeps all that it has."""
    partial = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
    with made(model, "xquant") as live, made(model, "xquant") as twin:
        for session in (live, twin):
            session.answer(TOKENS[:450], 0)
        size = llama_cpp.llama_state_seq_get_size_ext(live.ctx, 0, partial)
        state = (ctypes.c_uint8 * size)()
        assert llama_cpp.llama_state_seq_get_data_ext(live.ctx, state, size, 0, partial) == size
        for cut in (1, size // 2, size - 20):
            assert llama_cpp.llama_state_seq_set_data_ext(live.ctx, state, size - cut, 0, partial) == 0
        assert llama_cpp.llama_state_seq_set_data_ext(live.ctx, state, size, 0, partial) == size
        assert live.length() == twin.length() == 450
        got, want = (session.answer(TOKENS[450:470], 450).copy() for session in (live, twin))
        assert error(got, want) < 1e-6


@pytest.mark.parametrize("kv_type", ["f16", "xquant"])
def test_sequences_do_not_see_each_other(model: Model, kv_type: str) -> None:
    with made(model, kv_type, 3) as together, made(model, kv_type, 3) as alone:
        for first in range(0, 400, 40):
            for sequence in range(2):
                at = sequence * 450 + first
                together.answer(TOKENS[at : at + 40], first, [sequence])
        want = alone.answer(TOKENS[:400], 0, [0])[-1].copy()
        together.copy(0, 2)
        for sequence in (0, 2):
            got = together.answer(TOKENS[400:401], 400, [sequence])[-1].copy()
            assert np.isfinite(got).all()
            if sequence == 0:
                want = alone.answer(TOKENS[400:401], 400, [0])[-1].copy()
            assert error(got, want) < 1e-3
        together.remove(0, -1)
        assert together.length(0) == 0
        assert together.length(2) == 401
