"""States that go to another context or come from among other sequences: what F16 takes XQuant takes, and holds no more.

Found with scripts of other people: a slot of a server that is saved, erased and restored, a prompt cache that outlives
its context, several users who take turns in one cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import tiny_gguf
from support.contexts import Context, Logits, difference, llama_cpp

RNG = np.random.default_rng(16)
TOKENS, OTHER = (RNG.integers(3, tiny_gguf.N_VOCAB, 4000).tolist() for _ in range(2))


# Bounds of the mean difference of logits, in standard deviations, of one text in two caches. Measured: 7e-3 between F16
# and xquant, 2e-2 to 4e-2 between two texts, 5e-3 to 9e-3 where one page of six was lost.
SAME = 1e-3  # no more of one than of the other is sealed
SEALED = 1e-2  # pages are sealed in one that are F16 in the other

# cache types, and how close a sequence comes to what it was if its cells are free ones between those of others
OPEN = "xquant that never seals"
TYPES = {"f16": SAME, "q8_0": SAME, OPEN: SAME, "xquant": SEALED}


def made(path: Path, kv_type: str, **sizes: Any) -> Context:
    if kv_type == OPEN:
        return Context(path, "xquant", overrides={"xquant.window": -1}, **sizes)
    return Context(path, kv_type, **sizes)


def turns(context: Context, n: int, prompts: dict[int, Sequence[int]], at_once: int = 10) -> None:
    """n tokens of each sequence's prompt, one sequence after the other for every token."""
    for first in range(0, n, at_once):
        positions = range(first, min(first + at_once, n))
        context.feed([(prompt[i], i, [s]) for i in positions for s, prompt in prompts.items()])


def clear(context: Context) -> None:
    llama_cpp.llama_memory_clear(context.memory, True)


def remove(context: Context, sequence: int, first: int = -1, end: int = -1) -> None:
    assert llama_cpp.llama_memory_seq_rm(context.memory, sequence, first, end)


def answer(context: Context, sequence: int, first: int) -> Logits:
    """Logits of 20 tokens behind what a sequence holds; the sequence is afterwards what it was."""
    logits = context.decode(TOKENS[first : first + 20], first, [sequence])
    remove(context, sequence, first)
    return logits


# ---- one sequence among others ----


def removed_whole(context: Context) -> bytes:
    remove(context, 0)
    return context.save()


def removed(context: Context) -> bytes:
    remove(context, 0)
    return context.save(1)


def tail_removed(context: Context) -> bytes:
    """The other text was the sequence's own, and was taken back."""
    llama_cpp.llama_memory_seq_keep(context.memory, 0)
    remove(context, 0, 60)
    return context.save(0)


SAVES: dict[str, Callable[[Context], bytes]] = {
    "beside another": lambda context: context.save(1),
    "when another was removed": removed,
    "of all, when another was removed": removed_whole,
    "when its tail was removed": tail_removed,
}


@pytest.mark.parametrize("name", SAVES)
@pytest.mark.parametrize("kv_type", ["f16", "xquant"])
def test_a_state_depends_on_nothing_that_it_does_not_hold(paths: dict[str, Path], kv_type: str, name: str) -> None:
    """Else a slot file of one user carries another's keys and values."""
    states = []
    for other in (TOKENS, OTHER):
        with Context(paths["plain"], kv_type, n_ctx=1024, n_ubatch=64, n_seq=2) as context:
            if name == "when its tail was removed":
                other = TOKENS[:60] + other[60:]
            turns(context, 100, {0: other, 1: TOKENS[1000:]})
            states.append(SAVES[name](context))
    assert states[0] == states[1]


@pytest.mark.parametrize("kv_type", ["f16", "xquant"])
@pytest.mark.parametrize("n", [100, 450])
def test_a_state_is_as_large_as_alone(paths: dict[str, Path], kv_type: str, n: int) -> None:
    """Of open pages alone, and of sealed ones too, in which two sequences take turns."""
    with Context(paths["plain"], kv_type, n_ctx=1024, n_ubatch=64, n_seq=2) as context:
        context.decode(TOKENS[:n], 0, [1])
        alone = len(context.save(1))
    with Context(paths["plain"], "f16", n_ctx=1024, n_ubatch=64, n_seq=2) as context:
        turns(context, n, {0: OTHER, 1: TOKENS})
        f16 = len(context.save(1))
    with Context(paths["plain"], kv_type, n_ctx=1024, n_ubatch=64, n_seq=2) as context:
        turns(context, n, {0: OTHER, 1: TOKENS})
        among = len(context.save(1))
        if kv_type == "xquant":
            assert (context.info()["pages_sealed"] > 0) == (n > 100)
    # what a page adds to the rows of its cells is below 1 KiB; sealed pages that are shared may be saved as F16 rows
    n_pages = 1024 // 128
    assert among <= max(alone, f16) + n_pages * 1024, (among, alone, f16)


CHANGES: dict[str, Callable[[Any], object]] = {
    "removed": lambda memory: llama_cpp.llama_memory_seq_rm(memory, 0, -1, -1),
    "removed in part": lambda memory: llama_cpp.llama_memory_seq_rm(memory, 0, 30, 60),
    "shifted": lambda memory: llama_cpp.llama_memory_seq_add(memory, 0, 50, -1, 10),
    "divided": lambda memory: llama_cpp.llama_memory_seq_div(memory, 0, 50, -1, 2),
    "copied": lambda memory: llama_cpp.llama_memory_seq_cp(memory, 0, 2, -1, -1),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kv_type", ["f16", "xquant"])
def test_a_state_does_not_change_when_another_sequence_is(paths: dict[str, Path], kv_type: str, name: str) -> None:
    with Context(paths["plain"], kv_type, n_ctx=1024, n_ubatch=64, n_seq=3) as context:
        context.decode(TOKENS[:100], 0, [0])
        context.decode(TOKENS[:100], 0, [1])
        before = context.save(1)
        CHANGES[name](context.memory)
        assert context.save(1) == before


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize(("n_ctx", "n_seq", "n"), [(512, 2, 200), (512, 2, 245), (1024, 2, 450), (1024, 6, 160)])
def test_a_sequence_is_restored_where_it_was_among_others(
    paths: dict[str, Path], kv_type: str, n_ctx: int, n_seq: int, n: int
) -> None:
    """A unified cache that is nearly full: the only free cells lie between those of others, whatever their pages."""
    with made(paths["plain"], kv_type, n_ctx=n_ctx, n_ubatch=64, n_seq=n_seq) as context:
        turns(context, n, {s: TOKENS[100 * s :] for s in range(n_seq)})
        want = [answer(context, s, n) for s in range(n_seq)]
        state = context.save(0)
        remove(context, 0)
        assert context.load(state, 0) == len(state)
        for s in range(n_seq):
            assert llama_cpp.llama_memory_seq_pos_max(context.memory, s) == n - 1
            assert difference(answer(context, s, n), want[s]) < TYPES[kv_type]


@pytest.mark.parametrize(("n_ctx", "n"), [(4096, 800), (768, 100)])
@pytest.mark.parametrize("kv_type", TYPES)
def test_users_who_took_turns_are_restored_into_an_empty_cache(
    paths: dict[str, Path], kv_type: str, n_ctx: int, n: int
) -> None:
    users = range(4)
    with made(paths["plain"], kv_type, n_ctx=n_ctx, n_ubatch=128, n_seq=4) as context:
        turns(context, n, {s: TOKENS[100 * s :] for s in users}, at_once=100)
        want = [answer(context, s, n) for s in users]
        states = [context.save(s) for s in users]
        clear(context)
        assert [context.load(states[s], s) for s in users] == [len(state) for state in states]
        for s in users:
            assert difference(answer(context, s, n), want[s]) < TYPES[kv_type]


# ---- contexts of other sizes ----

# (n_ctx, n_ubatch, n_seq, unified) of the context that saves, and of the one that loads
SIZES = {
    "a larger context": ((768, 512, 1, True), (4096, 512, 1, True)),
    "a smaller context": ((4096, 512, 1, True), (1024, 512, 1, True)),
    "a smaller context without codes": ((4096, 512, 1, True), (768, 512, 1, True)),
    "smaller micro-batches": ((4096, 512, 1, True), (4096, 64, 1, True)),
    "larger micro-batches": ((4096, 64, 1, True), (4096, 512, 1, True)),
    "from one micro-batch": ((4096, 2048, 1, True), (4096, 512, 1, True)),
    "more sequences": ((2048, 128, 1, True), (2048, 128, 4, True)),
    "fewer sequences": ((2048, 128, 4, True), (2048, 128, 1, True)),
    "streams": ((2048, 128, 1, True), (4096, 128, 2, False)),
    "one stream": ((4096, 128, 2, False), (2048, 128, 2, True)),
}


def sized(path: Path, kv_type: str, size: tuple[int, int, int, bool]) -> Context:
    n_ctx, n_ubatch, n_seq, unified = size
    return Context(path, kv_type, n_ctx=n_ctx, n_ubatch=n_ubatch, n_seq=n_seq, unified=unified)


# between one stream and several, llama.cpp's own types cannot change, nor a state of all of a cache
EXCHANGES = [
    (kv_type, what, name)
    for name in SIZES
    for kv_type in ("f16", "xquant")
    for what in ("one sequence", "all")
    if "stream" not in name or (kv_type, what) == ("xquant", "one sequence")
]
# the one that saved seals a page more before it answers: measured 3.2e-3
CLOSE = {"a smaller context without codes": 4e-3}


@pytest.mark.parametrize(("kv_type", "what", "name"), EXCHANGES)
def test_a_context_of_another_size_takes_a_state(paths: dict[str, Path], kv_type: str, what: str, name: str) -> None:
    """It answers as the one that saved, or as if it had read the text itself: its room for F16 may be another."""
    sequence = 0 if what == "one sequence" else None
    saving, loading = SIZES[name]
    contexts = sized(paths["plain"], kv_type, saving), *(sized(paths["plain"], kv_type, loading) for _ in range(2))
    saved, loaded, direct = contexts
    saved.decode(TOKENS[:700], 0)
    direct.decode(TOKENS[:700], 0)
    loaded.decode(OTHER[:300], 0)
    state = saved.save(sequence)
    assert loaded.load(state, sequence) == len(state)
    assert llama_cpp.llama_memory_seq_pos_max(loaded.memory, 0) == 699
    got = answer(loaded, 0, 700)
    assert min(difference(got, answer(context, 0, 700)) for context in (saved, direct)) < CLOSE.get(name, SAME)
    for context in contexts:
        context.close()


# ---- what a state is of, and when it was saved ----


def test_a_state_of_other_weights_is_refused(paths: dict[str, Path]) -> None:
    """Of the same shape: F16 takes it, and answers nonsense."""
    shape = tiny_gguf.Shape(seed=1)
    path = tiny_gguf.write(paths["plain"].parent / "other weights.gguf", shape, tiny_gguf.random_weights(shape))
    with Context(path, "xquant") as saved, Context(paths["plain"], "xquant") as live:
        saved.decode(TOKENS[:700], 0)
        live.decode(OTHER[:300], 0)
        before = live.save()
        for sequence in (None, 0):
            assert live.load(saved.save(sequence), sequence) == 0
            assert live.save() == before


@pytest.mark.parametrize("sequence", [None, 0])
def test_damage_anywhere_is_noticed(paths: dict[str, Path], sequence: int | None) -> None:
    """Also in keys, values and codes: a sector of a disk that reads as ones."""
    with Context(paths["plain"], "xquant") as live:
        live.decode(TOKENS[:900], 0)
        state = live.save(sequence)
        assert live.info()["pages_sealed"] > 0
        for at in range(0, len(state) - 512, len(state) // 23):
            damaged = state[:at] + b"\xff" * 512 + state[at + 512 :]
            assert live.load(damaged, sequence) == 0, f"bytes {at} to {at + 511} of {len(state)}"
            assert live.save(sequence) == state


@pytest.mark.parametrize("sequence", [None, 0])
@pytest.mark.parametrize("calls", [0, 20, 40, 60, 100])
def test_a_state_saved_after_an_aborted_batch(paths: dict[str, Path], calls: int, sequence: int | None) -> None:
    """The abort comes between two nodes of a graph, by which pages were to be sealed."""
    left = [1 << 30]

    def abort(_: int) -> bool:
        left[0] -= 1
        return left[0] < 0

    callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(abort)
    with Context(paths["plain"], "xquant") as saved, Context(paths["plain"], "xquant") as loaded:
        saved.decode(TOKENS[:768], 0)
        llama_cpp.llama_set_abort_callback(saved.ctx, callback, None)
        left[0] = calls
        with pytest.raises(RuntimeError, match="llama_decode: 2"):
            saved.decode(TOKENS[768:1024], 768)
        left[0] = 1 << 30
        state = saved.save(sequence)
        assert loaded.load(state, sequence) == len(state)
        end = llama_cpp.llama_memory_seq_pos_max(saved.memory, 0) + 1
        got, want = (context.decode(TOKENS[end : end + 100], end) for context in (loaded, saved))
        # measured: 0 without an abort, 1.3e-3 if pages are sealed at other times, 4.7e-3 to 8.6e-3 with the fault
        assert difference(got, want) < 2e-3
