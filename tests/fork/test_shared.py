"""Layers without a projection of values (Gemma 4): most channels of a value are those of its key, over a weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from support.contexts import Context, Logits, llama_cpp
from support.keys_as_values import STILL, TURNED, D, write_gemma4
from support.models import SEALED as SEALED_ERROR
from support.models import error
from xquant_gguf import codec, fork, reference
from xquant_gguf.plan import PAGE, Shape

TOKENS = np.random.default_rng(3).integers(10, 280, 1000).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gemma4(tmp_path_factory.mktemp("shared") / "gemma4.gguf")


def shapes(context: Context) -> list[Shape]:
    found = fork.plan(context.ctx, "xquant")
    assert found
    return list(found[1])


def steps(context: Context) -> list[Logits]:
    """A prompt, tokens one by one, a removed tail, a state, a shift."""
    out = [context.decode(TOKENS[:700], 0)[-50:]]
    out += [context.decode([TOKENS[700 + i]], 700 + i) for i in range(5)]
    assert context.session.remove(0, 660)
    out.append(context.decode(TOKENS[:30], 660))
    state = context.save(0)
    context.session.clear()
    assert context.load(state, 0)
    out.append(context.decode(TOKENS[30:60], 690))
    assert llama_cpp.llama_memory_can_shift(context.memory)
    assert context.session.remove(0, 0, 40)
    context.session.shift(0, 40, -1, -40)
    return [*out, context.decode(TOKENS[60:90], 680)]


def test_what_keys_hold_is_not_stored_again(model: Path) -> None:
    with Context(model, "xquant", overrides={"xquant.window": -1}) as ours, Context(model, "f16") as f16:
        assert shapes(ours) == [Shape(D, 2 * TURNED, 1)] * 2
        found = [error(got, want) for got, want in zip(steps(ours), steps(f16), strict=True)]
        assert max(found) < 1e-5
        bytes_of = ours.info()["bytes_allocated"], fork.shapes(f16.ctx)[1]
    assert bytes_of[0] < bytes_of[1]


def test_sealed_pages_are_what_numpy_makes_of_the_rows(model: Path) -> None:
    """The rows that F16 would hold, keys in the stored order, with what the codes give back of them; exact kernels."""
    n = 5 * PAGE
    with codec.force_kernels("scalar"), Context(
        model, "xquant", n_ubatch=n, overrides={"xquant.open_bits": 16}
    ) as sealing, Context(
        model, "xquant", n_ubatch=n, overrides={"xquant.window": -1}
    ) as opened:  # fmt: skip
        for context in (sealing, opened):
            context.decode(TOKENS[:600], 0)
        found = fork.plan(opened.ctx, "xquant")
        assert found
        plan, widths, numbers = found
        for layer, shape, number in zip(plan.layers, widths, numbers, strict=True):
            for name, side, width in (("k", layer.k, shape.d), ("v", layer.v, shape.e)):
                rows = fork.read_rows(opened.ctx, number, name, 0, 600, width)
                for page in (1, 2):
                    at = slice(page * PAGE, (page + 1) * PAGE)
                    seal, back = (getattr(reference, f"{verb}_{name}") for verb in ("seal", "dequantize"))
                    rows[at] = back(side, width, *seal(side, rows[at], np.ones(PAGE, bool))[:2])
                fork.write_rows(opened.ctx, number, name, 0, rows)
        got, want = (context.decode(TOKENS[600:640], 600) for context in (sealing, opened))
        assert [i for i, page in sealing.pages().items() if not page.is_open] == [1, 2]
        assert error(got, want) < SEALED_ERROR


@pytest.mark.parametrize(
    ("factors", "weight"),
    [
        ([1.0] * (D // 2), 0.5),  # all pairs turn
        ([1.0] * 16 + [1e30] * 16 + [1.0] * (D // 2 - 32), 0.5),  # not the last ones
        (STILL, 0.0),  # a key that does not hold its value
        (STILL, float("nan")),
    ],
)
def test_other_layers_store_their_values(factors: list[float], weight: float, tmp_path: Path) -> None:
    path = write_gemma4(tmp_path / "other.gguf", factors, smallest_weight=weight)
    with Context(path, "xquant") as ours:
        assert shapes(ours) == [Shape(D, D, 1)] * 2
