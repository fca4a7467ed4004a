"""What calibration sees of a model: its rows, and answers after keys and values were replaced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from support import oracle, tiny_gguf
from xquant_gguf import codec
from xquant_gguf.plan import PAGE, Layer, Plan
from xquant_gguf.probe import Probe, Rows

SHAPE = tiny_gguf.Shape(n_layer=2)
WEIGHTS = tiny_gguf.random_weights(SHAPE)
N_READ, LENGTH = 4 * PAGE, 20
STARTS = (2 * PAGE, 3 * PAGE + 50, N_READ)
TOKENS = [int(t) for t in np.random.default_rng(5).integers(3, tiny_gguf.N_VOCAB, N_READ + LENGTH)]


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probe]:
    path = tiny_gguf.write(tmp_path_factory.mktemp("probe") / "model.gguf", SHAPE, WEIGHTS)
    with Probe(str(path), n_threads=1) as out:
        yield out


def coarse(rows: dict[tuple[int, str], Rows], layer: Layer) -> dict[tuple[int, str], Rows]:
    """Rows as codes give them back, page by page, all pages but the first."""
    out = {where: x.copy() for where, x in rows.items()}
    for (_, name), x in out.items():
        side, seal, unseal = getattr(layer, name), getattr(codec, f"seal_{name}"), getattr(codec, f"unseal_{name}")
        for head in x:
            for first in range(PAGE, N_READ, PAGE):
                head[first : first + PAGE] = unseal(side, x.shape[2], *seal(side, head[first : first + PAGE]))
    return out


def test_rows_are_those_of_the_model(probe: Probe) -> None:
    model = oracle.Oracle(SHAPE, WEIGHTS, [None] * SHAPE.n_layer, 0, 1, PAGE)
    model.decode(TOKENS[:N_READ])
    with probe.reading(TOKENS, N_READ) as reading:
        for i in range(SHAPE.n_layer):
            for name, stored in (("k", model.keys[i].rows), ("v", model.values[i].rows)):
                expected = stored[:, :N_READ].astype(np.float32)
                np.testing.assert_allclose(reading.rows[i, name].astype(np.float32), expected, rtol=0.02, atol=5e-3)


class AddsQueries(oracle.Oracle):
    """Sums the second moments of queries."""

    sums: dict[int, oracle.Array]

    def attention(self, il: int, q: oracle.Array) -> oracle.Array:
        by_kv_head = q.reshape(len(q), self.shape.n_head_kv, -1, q.shape[2])
        self.sums[il] = self.sums.get(il, 0) + np.einsum("nhrd,nhre->hde", by_kv_head, by_kv_head)
        return super().attention(il, q)


def test_moments_are_those_of_the_queries(probe: Probe) -> None:
    model = AddsQueries(SHAPE, WEIGHTS, [None] * SHAPE.n_layer, 0, 1, PAGE)
    model.sums = {}
    model.decode(TOKENS[:N_READ])
    with probe.reading(TOKENS, N_READ, STARTS, LENGTH) as reading:
        reading.kld({})  # what passages ask is not added
        for i in range(SHAPE.n_layer):
            expected = model.sums[i] / N_READ
            np.testing.assert_allclose(reading.queries[i], expected, rtol=0.02, atol=2e-3 * np.abs(expected).max())


def test_replaced_rows_change_the_answer_and_are_put_back(probe: Probe) -> None:
    with probe.reading(TOKENS, N_READ, STARTS, LENGTH) as reading:
        assert len(reading.kld({})) == len(STARTS) * LENGTH
        assert np.abs(reading.kld({})).max() < 1e-5
        rows = reading.rows[0, "v"].copy()
        rows[:, PAGE:] = 0
        assert reading.kld({(0, "v"): rows}).mean() > 1e-4
        assert np.abs(reading.kld({})).max() < 1e-5
        # cells behind the first two passages change the third alone
        rows = reading.rows[0, "v"].copy()
        rows[:, STARTS[1] :] = 0
        changed = reading.kld({(0, "v"): rows}).reshape(-1, LENGTH)
    assert np.abs(changed[:2]).max() < 1e-5
    assert changed[2].mean() > 1e-4


def test_replaced_rows_do_what_sealed_pages_do(tmp_path: Path) -> None:
    """One layer, whose keys and values do not depend on the cache: as an oracle that seals all pages but the first."""
    shape = replace(SHAPE, n_layer=1)
    weights = tiny_gguf.random_weights(shape)
    layer = Plan.from_preset("xquant-tiny", 1).layers[0]
    # rows as the model makes them
    plan = replace(Plan.from_preset("xquant-tiny", 1), layers=(replace(layer, k=replace(layer.k, rotate=False)),))
    starts = (2 * PAGE, N_READ)
    expected = []
    for first in starts:
        logp = []
        for layers in ([None], list(plan.layers)):
            model = oracle.Oracle(shape, weights, layers, 0, 1, N_READ)
            model.decode(TOKENS[:first])
            x = model.decode(TOKENS[first : first + LENGTH])
            logp.append(x - np.log(np.exp(x).sum(1, keepdims=True)))
        expected.append((np.exp(logp[0]) * (logp[0] - logp[1])).sum(1))
    path = tiny_gguf.write(tmp_path / "model.gguf", shape, weights)
    with Probe(str(path), n_threads=1) as probe, probe.reading(TOKENS, N_READ, starts, LENGTH) as reading:
        found = reading.kld(coarse(reading.rows, plan.layers[0])).reshape(-1, LENGTH)
    for right, one in zip(expected, found, strict=True):
        assert right.mean() > 1e-4
        np.testing.assert_allclose(one, right, rtol=0.2, atol=2e-2 * right.mean())


def test_plans_are_measured_as_they_run(probe: Probe) -> None:
    plan = replace(Plan.from_preset("xquant-tiny", SHAPE.n_layer), window=0)
    found = probe.kld(plan, TOKENS, 2 * PAGE)
    assert len(found) == len(TOKENS) - 2 * PAGE
    assert found.mean() > 1e-4
    assert np.abs(probe.kld(replace(plan, window=-1), TOKENS, 2 * PAGE)).max() < 1e-5
