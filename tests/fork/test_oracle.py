"""The fork of llama.cpp against the numpy oracle, on random tiny models: logits of whole prompts and of decode steps.

That the comparison means something is tested too: errors of the rule and of the plan, made in the oracle, are seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from support.oracle import PAGE, Array, Oracle, rope
from support.oracle_cases import (
    CASES,
    MODELS,
    OPEN,
    OPEN_F16,
    SEALED,
    Case,
    Fork,
    available_kernels,
    bounds_of,
    describe,
    deviation,
    expected,
    open_bounds,
    oracle_logits,
    seeing_codes,
    weights,
)
from xquant_gguf import Llama, native


@pytest.fixture(scope="module")
def fork(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fork]:
    """The fork; the kernel set in force is put back afterwards."""
    ffi, lib = native.load()
    in_force = ffi.string(lib.xq_kernels())
    yield Fork(tmp_path_factory.mktemp("tiny"))
    assert lib.xq_kernels_force(in_force) == 0


# ---- the oracle by itself ----


def test_micro_batches_do_not_matter_without_sealing() -> None:
    case = Case("gqa", window=-1)
    other = replace(case, n_ubatch=256, pieces=(33, 400, 267))
    np.testing.assert_allclose(expected(other), expected(case), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("n_stored", "window", "pinned", "pages"),
    [
        (255, 128, 0, []),
        (256, 128, 0, [0]),
        (383, 128, 0, [0]),
        (384, 128, 0, [0, 1]),
        (384, 128, 1, [1]),
        (384, 129, 0, [0]),
        (384, 0, 0, [0, 1, 2]),
        (384, 512, 0, []),
        (384, -1, 0, []),
    ],
)
def test_which_pages_are_sealed(n_stored: int, window: int, pinned: int, pages: list[int]) -> None:
    oracle = Oracle(MODELS["mha"], weights("mha"), [None] * 4, window, pinned, 128)
    oracle.n_stored = n_stored
    assert list(oracle.pages_to_seal()) == pages


@pytest.mark.parametrize("halves", [False, True])
def test_rope_keeps_scores_of_equal_distance(halves: bool) -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 64))

    def score(at_q: int, at_k: int) -> float:
        turned = (rope(x, np.array([at]), 10000.0, halves)[0, 0] for x, at in ((q, at_q), (k, at_k)))
        return float(np.dot(*turned))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert abs(score(7, 3) - score(8, 3)) > 1e-2


# ---- the fork ----


def test_tiny_model_has_a_tokenizer(fork: Fork) -> None:
    llama = Llama(str(fork.path("mha")), vocab_only=True, verbose=False)
    ids = llama.tokenize(b"ab\xff", add_bos=False, special=False)
    assert llama.detokenize(ids) == b"ab\xff"


@pytest.mark.parametrize("model", MODELS)
def test_never_sealing(fork: Fork, model: str) -> None:
    case = Case(model, window=-1)
    want = expected(case)
    for kernels in available_kernels():
        found = deviation(fork.logits(case, kernels), want)
        assert OPEN.hold(found), f"{kernels}: {describe(found)}"
    found = deviation(fork.run(case, kv_type="f16"), want)
    assert OPEN_F16.hold(found), f"F16 cache: {describe(found)}"


@pytest.mark.parametrize("kernels", SEALED)
@pytest.mark.parametrize("name", CASES)
def test_sealed_pages(fork: Fork, name: str, kernels: str) -> None:
    if kernels not in available_kernels():
        pytest.skip(f"this CPU cannot run {kernels}")
    case = CASES[name]
    found = deviation(fork.logits(case, kernels), expected(case))
    before = found[: (case.pinned + 1) * PAGE + case.window]
    assert open_bounds(case).hold(before), f"before any page is sealed: {describe(before)}"
    assert found.max() <= bounds_of(case, kernels).worst, describe(found)
    assert bounds_of(case, kernels).hold(found[seeing_codes(case)]), describe(found[seeing_codes(case)])


def test_every_kernel_set_has_bounds() -> None:
    assert set(available_kernels()) <= set(SEALED)


# ---- the comparison sees errors of the rule ----


class SealsLate(Oracle):
    """Keeps every page open for one page too long."""

    def pages_to_seal(self) -> Iterator[int]:
        self.n_stored -= PAGE
        yield from list(super().pages_to_seal())
        self.n_stored += PAGE


class SealsEarly(Oracle):
    """Seals what leaves the window within the micro-batch, not before it."""

    def pages_to_seal(self) -> Iterator[int]:
        self.n_stored += self.n_ubatch
        yield from list(super().pages_to_seal())
        self.n_stored -= self.n_ubatch


class SealsPinned(Oracle):
    """Forgets that the first pages stay open."""

    def pages_to_seal(self) -> Iterator[int]:
        self.pinned = 0
        return super().pages_to_seal()


class SplitsMicroBatches(Oracle):
    """Looks for pages to seal twice as often."""

    def decode(self, tokens: Sequence[int]) -> Array:
        self.n_ubatch = PAGE
        return super().decode(tokens)


class ReadsNextHead(Oracle):
    """Reads the codes of another KV head."""

    def seal(self, il: int, page: int) -> None:
        super().seal(il, page)
        cells = slice(page * PAGE, (page + 1) * PAGE)
        for side in (self.keys[il], self.values[il]):
            side.read[:, cells] = np.roll(side.read[:, cells], 1, axis=0)


class MapsOtherHead(Oracle):
    """Predicts values from another KV head of the source."""

    def predict(self, il: int, head: int, page: int) -> list[NDArray[np.float32]]:
        heads, weight = self.maps[il]
        right, self.maps[il] = self.maps[il], (heads[::-1], weight)
        out = super().predict(il, head, page)
        self.maps[il] = right
        return out


class LeavesKeys(Oracle):
    """Stores keys in the coordinates in which they come."""

    def micro_batch(self, tokens: Sequence[int]) -> Array:
        self.transforms = {}
        return super().micro_batch(tokens)


WRONG_RULES = [
    ("keys-in-coordinates-of-their-own", LeavesKeys),
    ("mapped", MapsOtherHead),
    ("mha-xquant", SealsEarly),
    ("no-window", SealsEarly),
    ("gqa-xquant", SealsPinned),
    ("gqa-xquant", SplitsMicroBatches),
    ("gqa-tiny", ReadsNextHead),
]

WRONG_PLANS = [
    ("mapped", "v", 1, {"source": -1}),
    ("mha-xquant", "v", None, {"eta": 0.0}),
    ("mha-xquant", "v", None, {"param": "f16"}),
    ("mha-xquant", "v", 3, {"rotate": False}),
    ("mha-xquant", "k", None, {"rotate": False}),
    ("mqa-small", "k", None, {"eta": 0.0}),
    ("mqa-small", "k", None, {"group": 64}),
    ("gqa-tiny", "k", None, {"fit": "minmax"}),
    ("mha-paper", "k", None, {"eta": 0.09}),
    ("mha-paper", "v", 3, {"owner": 0}),
    ("k96-v64-paper", "v", 3, {"owner": -1}),
    ("borrowed-keys-and-no-codes", "k", 2, {"owner": -1, "fit": "clip"}),
    ("borrowed-keys-and-no-codes", "v", 2, {"group": 0}),
]


def assert_seen(fork: Fork, name: str, kernels: str, wrong: Array) -> None:
    """The median deviation from a wrong oracle is at least twice what the bounds allow."""
    case = CASES[name]
    found = deviation(fork.logits(case, kernels), wrong)[seeing_codes(case)]
    assert np.median(found) > 2 * bounds_of(case, kernels).median, describe(found)


@pytest.mark.parametrize("name", CASES)
def test_sees_a_page_sealed_late(fork: Fork, name: str) -> None:
    wrong = oracle_logits(CASES[name], SealsLate)
    for kernels in available_kernels():
        assert_seen(fork, name, kernels, wrong)


class NeverBytes(Oracle):
    """Keeps all open pages in F16."""

    def shrink(self, il: int, page: int) -> None:
        pass


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.open_bits == 8])
def test_sees_open_pages_that_are_not_in_bytes(fork: Fork, name: str) -> None:
    case = CASES[name]
    found = deviation(fork.logits(case, "scalar"), oracle_logits(case, NeverBytes))
    found = found[max(PAGE, case.n_ubatch) : (case.pinned + 1) * PAGE + case.window]  # page 0 has left its slot
    assert np.median(found) > 10 * OPEN.median, describe(found)


@pytest.mark.parametrize(("name", "kind"), WRONG_RULES)
def test_sees_a_wrong_rule(fork: Fork, name: str, kind: type[Oracle]) -> None:
    assert_seen(fork, name, "scalar", oracle_logits(CASES[name], kind))


@pytest.mark.parametrize(("name", "side", "only", "fields"), WRONG_PLANS)
def test_sees_a_wrong_plan(fork: Fork, name: str, side: str, only: int | None, fields: dict[str, object]) -> None:
    case = CASES[name]
    layers = case.plan()
    for il, layer in enumerate(layers):
        if layer is not None and only in (None, il):
            layers[il] = replace(layer, **{side: replace(getattr(layer, side), **fields)})
    assert_seen(fork, name, "scalar", oracle_logits(case, layers=layers))
