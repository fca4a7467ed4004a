"""What calibration sees of a model: rows, queries, and answers after keys and values were replaced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import tiny_gguf

from xquant_gguf import codec
from xquant_gguf.harm import Attention, read_back
from xquant_gguf.plan import PAGE, Plan
from xquant_gguf.probe import Probe

SHAPE = tiny_gguf.Shape(n_layer=2)
WEIGHTS = tiny_gguf.random_weights(SHAPE)
N_PREFIX, N_SCORED = 3 * PAGE, 40
TOKENS = [int(t) for t in np.random.default_rng(5).integers(3, tiny_gguf.N_VOCAB, N_PREFIX + N_SCORED)]


class Recorder(oracle.Oracle):
    """Keeps the queries of the last micro-batch, times the scale of scores."""

    def attention(self, il: int, q: oracle.Array) -> oracle.Array:
        self.queries[il] = q / np.sqrt(q.shape[-1])
        return super().attention(il, q)

    queries: dict[int, oracle.Array]


def recorder(layers: Plan | None = None) -> Recorder:
    out = Recorder(SHAPE, WEIGHTS, [None] * SHAPE.n_layer if layers is None else layers.layers, 0, 1, PAGE)
    out.queries = {}
    return out


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probe]:
    path = tiny_gguf.write(tmp_path_factory.mktemp("probe") / "model.gguf", SHAPE, WEIGHTS)
    with Probe(str(path), n_ctx=1024, n_threads=1) as out:
        out.read(TOKENS[:N_PREFIX], TOKENS[N_PREFIX:])
        yield out


def test_rows_and_queries_are_those_of_the_model(probe: Probe) -> None:
    model = recorder()
    model.decode(TOKENS[:N_PREFIX])
    model.decode(TOKENS[N_PREFIX:])
    for i in range(SHAPE.n_layer):
        np.testing.assert_allclose(probe.queries[i], model.queries[i], rtol=0.02, atol=2e-3)
        stored = {"k": model.keys[i].rows, "v": model.values[i].rows}
        for name, rows in stored.items():
            expected = rows[:, : N_PREFIX + N_SCORED].astype(np.float32)
            np.testing.assert_allclose(probe.rows[i, name].astype(np.float32), expected, rtol=0.02, atol=5e-3)


def test_replaced_rows_change_the_answer_and_are_put_back(probe: Probe) -> None:
    assert np.abs(probe.kld({})).max() < 1e-5
    rows = probe.rows[0, "v"][:, :N_PREFIX].copy()
    rows[:, PAGE:] = 0
    assert probe.kld({(0, "v"): rows}).mean() > 1e-4
    assert np.abs(probe.kld({})).max() < 1e-5


def test_replaced_rows_do_what_sealed_pages_do(tmp_path: Path) -> None:
    """One layer, whose keys and values do not depend on the cache: as an oracle that seals all pages but the first."""
    shape = replace(SHAPE, n_layer=1)
    weights = tiny_gguf.random_weights(shape)
    plan = Plan.from_preset("xquant-tiny", 1)
    exact, sealing = (oracle.Oracle(shape, weights, layers, 0, 1, N_PREFIX) for layers in ([None], list(plan.layers)))
    logits = []
    for model in (exact, sealing):
        model.decode(TOKENS[:N_PREFIX])
        x = model.decode(TOKENS[N_PREFIX:])
        logits.append(x - np.log(np.exp(x).sum(1, keepdims=True)))
    expected = (np.exp(logits[0]) * (logits[0] - logits[1])).sum(1)
    path = tiny_gguf.write(tmp_path / "model.gguf", shape, weights)
    with Probe(str(path), n_ctx=1024, n_threads=1) as probe:
        probe.read(TOKENS[:N_PREFIX], TOKENS[N_PREFIX:])
        rows = {(0, name): probe.rows[0, name][:, :N_PREFIX] for name in "kv"}
        layer = plan.layers[0]
        found = probe.kld({w: read_back(layer.k if w[1] == "k" else layer.v, x, w[1]) for w, x in rows.items()})
    assert expected.mean() > 1e-4
    np.testing.assert_allclose(found, expected, rtol=0.2, atol=2e-2 * expected.mean())


def test_errors_are_those_of_the_outputs(probe: Probe) -> None:
    """Against softmax written out for one query head at a time."""
    layer = Plan.from_preset("xquant-tiny", 1).layers[0]
    q, k, v = probe.queries[1], *(probe.rows[1, name].astype(np.float64) for name in "kv")
    attention = Attention(q, probe.rows[1, "k"], probe.rows[1, "v"])

    def outputs(k: np.ndarray, v: np.ndarray) -> np.ndarray:
        out = []
        for t, token in enumerate(q.astype(np.float64)):
            for h, row in enumerate(token):
                head, n = h // (SHAPE.n_head // SHAPE.n_head_kv), N_PREFIX + t + 1
                p = np.exp(k[head, :n] @ row)
                out.append(p @ v[head, :n] / p.sum())
        return np.array(out)

    before = outputs(k, v)
    for name, side in (("k", layer.k), ("v", layer.v)):
        rows = read_back(side, probe.rows[1, name][:, :N_PREFIX], name)
        changed = {"k": k.copy(), "v": v.copy()}
        changed[name][:, :N_PREFIX] = rows
        expected = ((outputs(**changed) - before) ** 2).sum()
        assert attention.error(name, rows) == pytest.approx(expected, rel=1e-3)
        assert expected > 0


def test_read_back_keeps_the_first_page(probe: Probe) -> None:
    side = Plan.from_preset("xquant", 1).layers[0].v
    rows = probe.rows[0, "v"][:, :N_PREFIX]
    back = read_back(side, rows, "v")
    assert (back[:, :PAGE] == rows[:, :PAGE]).all()
    sealed = codec.seal_v(side, rows[1, PAGE : 2 * PAGE])
    assert (back[1, PAGE : 2 * PAGE] == codec.unseal_v(side, rows.shape[2], *sealed)).all()
