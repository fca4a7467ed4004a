"""What llama.cpp's own cache can do, the XQuant cache can do: sequences, streams, shifts, states, on tiny models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from support import tiny_gguf
from support.contexts import Context, Logits, llama_cpp
from xquant_gguf import fork
from xquant_gguf.divergence import Expected
from xquant_gguf.plan import PAGE, Plan
from xquant_gguf.plan import Shape as KvShape

SHAPE = tiny_gguf.Shape()
# KL divergence of a cache that nothing was done to.  Measured after operations: 0.7e-4 to 1.5e-4.
CLOSE = 3e-4
TOKENS = np.random.default_rng(11).integers(3, tiny_gguf.N_VOCAB, 1400).tolist()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_gguf.write(folder / "tiny.gguf", SHAPE, tiny_gguf.random_weights(SHAPE))


@pytest.fixture
def xquant(path: Path) -> Iterator[Context]:
    with Context(path, "xquant") as context:
        yield context


def kld(a: Logits, b: Logits) -> float:
    """Mean KL divergence of rows of logits."""
    return float(Expected(a).kld(b).mean())


def same(a: Logits, b: Logits) -> bool:
    """But for the order in which pages are summed up, which is another one where a sequence came to other pages.

    Measured: 0, and 2e-6 in other pages; a page that was coded once more: 1e-2.
    """
    return bool(np.abs(a - b).max() <= 1e-4 * a.std())


def reference(path: Path, tokens: list[int]) -> Logits:
    """Logits of the F16 cache."""
    with Context(path, "f16") as context:
        return context.decode(tokens, 0)


def test_pages_and_bytes(xquant: Context) -> None:
    plan = Plan.from_preset("xquant", SHAPE.n_layer)
    shapes = [KvShape(SHAPE.key_length, SHAPE.value_length, SHAPE.n_head_kv)] * SHAPE.n_layer
    info = xquant.info()
    assert (info["n_slots"], info["n_bytes"], info["open_bits"]) == (plan.slots(2048), plan.byte_slots(2048), 8)
    assert (info["pages_free"], info["pages_open"], info["pages_sealed"]) == (16, 0, 0)
    # of each layer counters, heads of a map and arrivals; 24 bytes a page and 4 a slot; what keys are rotated by
    small = SHAPE.n_layer * 3 * 64 + 16 * 24 + 3 * 4 + 4 * (SHAPE.key_length & -SHAPE.key_length) ** 2
    assert info["bytes_allocated"] == plan.cache_bytes(shapes, 2048) + small
    xquant.decode(TOKENS[:1000], 0)
    info = xquant.info()
    # 1000 tokens are 8 pages; the last micro-batch began at 896: pages 1 to 5 were older than its window
    assert (info["pages_sealed"], info["pages_open"], info["pages_bytes"]) == (5, 3, 2)
    block = (
        plan.true_bits(shapes) / 8 * PAGE * SHAPE.n_layer * SHAPE.n_head_kv * (SHAPE.key_length + SHAPE.value_length)
    )
    heads, width = SHAPE.n_layer * SHAPE.n_head_kv, SHAPE.key_length + SHAPE.value_length
    in_bytes = heads * (PAGE * width + 4 * (SHAPE.key_length + PAGE))
    assert info["bytes_used"] == 5 * block + 2 * in_bytes + 2 * PAGE * heads * width


def test_bytes_of_matrices(path: Path) -> None:
    """Those that keys are multiplied by, and those for queries."""
    plan = Plan.from_preset("xquant", SHAPE.n_layer)
    layers = tuple(replace(layer, k=replace(layer.k, rotate=False)) for layer in plan.layers)
    matrices = np.stack([np.eye(SHAPE.key_length)] * SHAPE.n_head_kv).astype("<f2").tobytes()
    both = [replace(plan, layers=layers, transforms=dict.fromkeys(held, matrices)) for held in ((), (0, 2))]
    shapes = [KvShape(SHAPE.key_length, SHAPE.value_length, SHAPE.n_head_kv)] * SHAPE.n_layer
    found = []
    for one in both:
        with Context(path, "xquant", plan=one) as context:
            found.append(context.info()["bytes_allocated"])
    assert found[1] - found[0] == 4 * len(matrices)
    assert both[1].cache_bytes(shapes, 2048) - both[0].cache_bytes(shapes, 2048) == 4 * len(matrices)


def test_a_cache_that_fits_into_its_window_is_f16(path: Path) -> None:
    tokens = TOKENS[:250]
    with Context(path, "xquant", n_ctx=256, n_ubatch=256) as context:
        got = context.decode(tokens, 0)
        assert context.info()["pages_sealed"] == 0
        assert context.info()["n_slots"] == 2
    assert np.abs(got - reference(path, tokens)).max() < 2e-3


def test_cutting_the_tail_inside_a_sealed_page(path: Path, xquant: Context) -> None:
    xquant.decode(TOKENS[:900], 0)
    assert xquant.info()["pages_sealed"] >= 4
    for cut in (700, 300, 130):
        assert llama_cpp.llama_memory_seq_rm(xquant.memory, 0, cut, -1)
        got = xquant.decode(TOKENS[cut:1000], cut)
        assert kld(reference(path, TOKENS[:1000])[cut:], got) < CLOSE
    assert llama_cpp.llama_memory_seq_pos_max(xquant.memory, 0) == 999


def test_a_beginning_that_prompts_share_is_not_encoded_again(xquant: Context) -> None:
    """What was cut off lay in the same page: the codes of the beginning stay, and new tokens go elsewhere."""
    probes = []
    xquant.decode(TOKENS[:500], 0)
    for i in range(4):
        xquant.decode(TOKENS[600 + 200 * i : 900 + 200 * i], 500)
        assert llama_cpp.llama_memory_seq_rm(xquant.memory, 0, 500, -1)
        assert xquant.pages()[3].is_open is False
        probes.append(xquant.decode(TOKENS[500:520], 500))
        assert llama_cpp.llama_memory_seq_rm(xquant.memory, 0, 500, -1)
    for probe in probes[1:]:
        assert np.array_equal(probe, probes[0])


def test_free_cells_of_sealed_pages_are_used_in_the_end(path: Path) -> None:
    """They are open again then, with the keys and values that they had."""

    def run(kv_type: str, hole: bool) -> Logits:
        with Context(path, kv_type, n_ctx=1024) as context:
            context.decode(TOKENS[:1000], 0)
            if not hole:
                return context.decode(TOKENS[1000:1024], 1000)
            assert llama_cpp.llama_memory_seq_rm(context.memory, 0, 200, 300)
            context.decode(TOKENS[1000:1024], 1000)  # what is free elsewhere
            if kv_type == "xquant":
                assert [p for p, page in context.pages().items() if page.is_open] == [0, 6, 7]
            out = context.decode(TOKENS[1024:1124], 1024)
            if kv_type == "xquant":
                assert [context.pages()[p].n_cells for p in (1, 2)] == [128, 128]
                assert context.pages()[1].is_open
            return out

    with_hole, without = (kld(run("f16", hole), run("xquant", hole)) for hole in (True, False))
    assert with_hole < 1.5 * without


@pytest.mark.parametrize("open_bits", [8, 16])
def test_which_page_is_sealed_first(path: Path, open_bits: int) -> None:
    """Without a free slot, that which was written longest ago: neither the newest nor the pinned one."""
    with Context(path, "xquant", n_ctx=1024, overrides={"xquant.open_bits": open_bits}) as context:
        assert context.info()["n_slots"] + context.info()["n_bytes"] == 3
        context.decode(TOKENS[:1024], 0)
        for position in (200, 330, 460, 590, 720):  # one cell in each of pages 1 to 5
            assert llama_cpp.llama_memory_seq_rm(context.memory, 0, position, position + 1)
        is_open = []
        for i in range(5):
            context.decode(TOKENS[1024 + i : 1025 + i], 1024 + i)
            is_open.append([p for p, page in context.pages().items() if page.is_open])
        assert is_open == [[0, 1, 7], [0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 5]]
        assert {p: page.age for p, page in context.pages().items()} == {
            0: 901, 1: 4, 2: 3, 3: 2, 4: 1, 5: 0, 6: 133, 7: 5,
        }  # fmt: skip


@pytest.mark.parametrize(("open_bits", "are_open"), [(16, [0, 1, 2]), (8, [0, 2, 7])])
def test_the_first_page_of_a_sequence_is_sealed_last(path: Path, open_bits: int, are_open: list[int]) -> None:
    """After a shift, other pages may hold first positions too; they go before it (found by the soak run).

    With one slot of rows the two cells are written one after the other, and page 1 is sealed for the second one.
    """
    with Context(path, "xquant", n_ctx=1024, overrides={"xquant.open_bits": open_bits}) as context:
        context.decode(TOKENS[:1024], 0)
        llama_cpp.llama_memory_seq_add(context.memory, 0, 1014, 1024, -924)
        for position in (200, 330):  # one cell in each of pages 1 and 2
            assert llama_cpp.llama_memory_seq_rm(context.memory, 0, position, position + 1)
        context.decode(TOKENS[1024:1026], 1014)
        assert [p for p, page in context.pages().items() if page.is_open] == are_open


def test_removing_the_middle_hides_it(path: Path) -> None:
    """Cells of a removed middle are not seen, and are written again when the cache has no others."""
    runs = []
    for kv_type in ("f16", "xquant"):
        with Context(path, kv_type, n_ctx=1024) as context:
            context.decode(TOKENS[:900], 0)
            assert llama_cpp.llama_memory_seq_rm(context.memory, 0, 200, 700)
            runs.append(context.decode(TOKENS[900:1300], 900))
    assert kld(*runs) < CLOSE


def test_a_full_cache_is_an_error_and_the_context_goes_on(path: Path) -> None:
    for kv_type in ("f16", "xquant"):
        with Context(path, kv_type, n_ctx=1024) as context, Context(path, kv_type, n_ctx=1024) as twin:
            for c in (context, twin):
                c.decode(TOKENS[:1000], 0)
            with pytest.raises(RuntimeError, match="llama_decode: 1"):
                context.decode(TOKENS[1000:1100], 1000)
            got, want = (c.decode(TOKENS[1000:1024], 1000) for c in (context, twin))
            assert np.array_equal(got, want)


@pytest.mark.parametrize("unified", [True, False])
def test_several_sequences(path: Path, unified: bool) -> None:
    """Two sequences that share a prefix, decoded in mixed batches, against each on its own."""
    common, one, two = TOKENS[:600], TOKENS[600:700], TOKENS[700:800]
    with Context(path, "xquant", n_ctx=4096, n_seq=2, unified=unified) as context:
        context.decode(common, 0, [0])
        llama_cpp.llama_memory_seq_cp(context.memory, 0, 1, -1, -1)
        rows = [(t, 600 + i, [s]) for i in range(100) for s, t in ((0, one[i]), (1, two[i]))]
        got = np.concatenate([context.decode_mixed(rows[i : i + 40]) for i in range(0, 200, 40)])
        assert context.info()["n_streams"] == (1 if unified else 2)
        # what the windows of both leave, once if they share it
        assert context.info()["pages_sealed"] == (3 if unified else 6)
    if not unified:  # rows of one stream come out together
        order = [i for start in range(0, 200, 40) for i in range(start, start + 40)]
        got = got[order]
    for s, tail in enumerate((one, two)):
        assert kld(reference(path, common + tail)[600:], got[s::2]) < CLOSE


def test_a_single_token_sees_its_own_sequence_alone(path: Path) -> None:
    """Its mask is made in a shorter way where it sees all cells, which is not so here."""
    with Context(path, "xquant", n_seq=2, overrides={"xquant.window": 512}) as context:  # nothing is sealed
        context.decode(TOKENS[:300], 0, [0])
        context.decode(TOKENS[600:900], 0, [1])
        got = context.decode(TOKENS[300:301], 300, [0])
    assert kld(reference(path, TOKENS[:301])[300:], got) < CLOSE


def test_keep_and_positions(xquant: Context) -> None:
    xquant.decode(TOKENS[:300], 0)
    llama_cpp.llama_memory_seq_keep(xquant.memory, 0)
    assert llama_cpp.llama_memory_seq_pos_min(xquant.memory, 0) == 0
    assert llama_cpp.llama_memory_seq_pos_max(xquant.memory, 0) == 299


@pytest.mark.parametrize("data", [True, False])
def test_a_cleared_cache_is_as_a_new_one(path: Path, xquant: Context, data: bool) -> None:
    """No page keeps its slot, or the rows in it, and what comes next is stored as it would have been at first."""
    xquant.decode(TOKENS[:900], 0)
    llama_cpp.llama_memory_clear(xquant.memory, data)
    with Context(path, "xquant") as new:
        assert xquant.info() == new.info()
        for context in (xquant, new):
            with pytest.raises(ValueError, match="open cells"):
                fork.read_rows(context.ctx, 0, "k", 0, 1, SHAPE.key_length)
        got, want = (context.decode(TOKENS[400:1300], 0) for context in (xquant, new))
        assert np.array_equal(got, want)
        assert xquant.save() == new.save()


def test_context_shift(path: Path) -> None:
    """Dropping tokens after the first ones and moving the rest down, as chat front ends do when the context is full."""
    tail = slice(1000, 1100)

    def run(kv_type: str, shift: int) -> Logits:
        with Context(path, kv_type) as context:
            context.decode(TOKENS[: tail.start], 0)
            assert llama_cpp.llama_memory_can_shift(context.memory)
            assert llama_cpp.llama_memory_seq_rm(context.memory, 0, 128, 384)
            if shift:
                llama_cpp.llama_memory_seq_add(context.memory, 0, 384, -1, -shift)
            return context.decode(TOKENS[tail], tail.start - shift)

    shifted, unshifted = run("f16", 256), run("f16", 0)
    loss, loss_unshifted = kld(shifted, run("xquant", 256)), kld(unshifted, run("xquant", 0))
    assert loss < 1.3 * loss_unshifted


@pytest.mark.parametrize("kv_type", ["xquant", "xquant-tiny", "xquant-paper"])
def test_a_loaded_state_goes_on_bit_for_bit(path: Path, kv_type: str) -> None:
    with Context(path, kv_type) as saved, Context(path, kv_type) as loaded:
        saved.decode(TOKENS[:900], 0)
        state = saved.save()
        loaded.decode(TOKENS[300:500], 0)  # what was there before is gone
        assert loaded.load(state) == len(state)
        for i in range(900, 1200, 50):
            assert np.array_equal(saved.decode(TOKENS[i : i + 50], i), loaded.decode(TOKENS[i : i + 50], i))
        assert saved.info() == loaded.info()


def test_a_loaded_state_writes_into_the_same_cells(path: Path) -> None:
    """First those of the newest page that are left, then the page that was freed, not one behind the last."""
    with Context(path, "xquant") as saved, Context(path, "xquant") as loaded:
        saved.decode(TOKENS[:900], 0)
        llama_cpp.llama_memory_seq_rm(saved.memory, 0, 250, 400)
        state = saved.save()
        assert loaded.load(state) == len(state)
        for context in (saved, loaded):
            context.decode(TOKENS[900:1100], 900)
            assert (context.pages()[7].n_cells, context.pages()[2].n_cells) == (128, 76)
        assert loaded.save() == saved.save()


def test_a_state_is_about_as_small_as_the_cache(path: Path) -> None:
    sizes = {}
    for kv_type in ("f16", "xquant"):
        with Context(path, kv_type) as context:
            context.decode(TOKENS[:1400], 0)
            sizes[kv_type] = len(context.save(0))
            if kv_type == "xquant":  # a cell says where it belongs in 28 bytes
                assert sizes[kv_type] < context.info()["bytes_used"] + 28 * 1400 + 1024
    assert sizes["xquant"] < 0.5 * sizes["f16"]


def test_one_sequence_moves_to_another_context(path: Path) -> None:
    with Context(path, "xquant", n_seq=2) as saved, Context(path, "xquant", n_seq=2) as loaded:
        saved.decode(TOKENS[:600], 0, [1])
        state = saved.save(1)
        loaded.decode(TOKENS[800:900], 0, [0])
        assert loaded.load(state, 0) == len(state)
        got = loaded.decode(TOKENS[600:700], 600, [0])
        assert kld(saved.decode(TOKENS[600:700], 600, [1]), got) < 1e-3


def test_states_that_do_not_fit_are_refused(path: Path) -> None:
    with Context(path, "xquant") as saved, Context(path, "xquant-tiny") as other:
        saved.decode(TOKENS[:700], 0)
        state = saved.save(0)
        other.decode(TOKENS[:400], 0)
        assert other.load(state, 0) == 0
        # the state of another plan was refused before anything changed
        assert llama_cpp.llama_memory_seq_pos_max(other.memory, 0) == 399
        for cut in (10, 100, len(state) // 2, len(state) - 1):
            assert saved.load(state[:cut], 0) == 0
        assert saved.save(0) == state
        assert saved.load(state, 0) == len(state)
        with Context(path, "xquant") as twin:
            twin.decode(TOKENS[:700], 0)
            assert same(*(context.decode(TOKENS[700:800], 700) for context in (saved, twin)))


def test_a_damaged_state_never_crashes(path: Path) -> None:
    rng = np.random.default_rng(3)
    with Context(path, "xquant") as saved, Context(path, "xquant") as twin:
        for context in (saved, twin):
            context.decode(TOKENS[:700], 0)
        state = saved.save(0)
        for _ in range(200):
            damaged = bytearray(state)
            for at in rng.integers(0, min(len(state), 6000), 4):
                damaged[at] = rng.integers(256)
            saved.load(bytes(damaged), 0)
        assert saved.load(state, 0) == len(state)  # whatever was taken before leaves nothing behind
        assert same(*(context.decode(TOKENS[700:800], 700) for context in (saved, twin)))


def test_two_contexts_in_any_order(path: Path) -> None:
    first, second = Context(path, "xquant"), Context(path, "xquant-tiny")
    a = first.decode(TOKENS[:500], 0)
    second.decode(TOKENS[:500], 0)
    first.close()
    third = Context(path, "xquant")
    assert np.array_equal(third.decode(TOKENS[:500], 0), a)
    second.close()
    third.close()


def test_k_and_v_must_agree(path: Path) -> None:
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.type_k = 43
    assert not llama_cpp.llama_init_from_model(model, params)
    assert fork.error() == "cache types K and V must both be xquant, or neither"
    params.type_v = 43
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    assert not llama_cpp.llama_init_from_model(model, params)
    assert "flash attention" in fork.error()
    llama_cpp.llama_model_free(model)


def test_keys_with_a_bias_are_shifted(tmp_path: Path) -> None:
    """They lie rotated, after their channels were made smaller, and come back the way they went.

    Measured: 5e-3, since large offsets are spread over all channels and rounded to F16; 0.97 without the shift.
    """
    shape = tiny_gguf.Shape(arch="qwen2", n_head=3, n_head_kv=1, n_embd=192, freq_base=1e6, seed=2)
    weights = tiny_gguf.random_weights(shape)
    for il in range(shape.n_layer):
        weights[f"blk.{il}.attn_k.bias"] *= 5
    path = tiny_gguf.write(tmp_path / "biased.gguf", shape, weights)
    answers = []
    for kv_type, by in (("f16", -50), ("xquant", -50), ("f16", 0)):
        with Context(path, kv_type, plan={"window": -1}) as context:
            context.decode(TOKENS[:300], 0)
            llama_cpp.llama_memory_seq_rm(context.memory, 0, 100, 150)
            llama_cpp.llama_memory_seq_add(context.memory, 0, 150, -1, by)
            answers.append(context.decode(TOKENS[300:320], 300 + by))
    want, got, unshifted = answers
    assert np.abs(got - want).max() < 1e-2 * want.std()
    assert np.abs(unshifted - want).max() > 0.1 * want.std()
