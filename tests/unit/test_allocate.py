"""The allocation of bits against all plans there are, and budgets that are kept."""

from __future__ import annotations

from itertools import product
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xquant_gguf.allocate import Choice, allocate, spread
from xquant_gguf.calibrate import Budget, data_free
from xquant_gguf.plan import Shape, Side
from xquant_gguf.sides import value_side

SHAPES = [Shape(64, 64, 3)] * 7


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[Choice]], list[list[Choice]], list[list[Choice]]]:
    """Keys, own values and mapped values of three layers, two choices each, harm falling with bits."""
    harm = st.floats(0.01, 1)

    def choices(sides: list[Side], source_bits: int = 0) -> list[Choice]:
        weight = draw(harm)
        return [Choice(s, s.bits + 0.25, weight * 0.3**s.bits * draw(st.floats(0.5, 1)), source_bits) for s in sides]

    keys = [choices([Side(1, 128), Side(3, 128)]) for _ in range(3)]
    own = [choices([value_side(1), value_side(2)]) for _ in range(3)]
    mapped: list[list[Choice]] = [[] for _ in range(3)]
    for i, source in ((1, 0), (2, 1), (2, 0)):
        for bits in (1, 2):
            mapped[i] += choices([value_side(0, source), value_side(1, source)], bits)
    return keys, own, mapped


@settings(max_examples=60, deadline=None)
@given(problem=problems(), budget=st.floats(5.5, 14))
def test_no_plan_of_its_cost_does_less_harm(problem: tuple[list[list[Choice]], ...], budget: float) -> None:
    """Against all plans there are; what is left of the budget only makes it better."""
    keys, own, mapped = problem
    totals = {}
    for ks in product(*keys):
        for vs in product(*(o + m for o, m in zip(own, mapped, strict=True))):
            fits = all(v.side.source < 0 or vs[v.side.source].side.bits == v.source_bits for v in vs)
            sources = [v.side.source for v in vs]
            in_runs = sources in ([-1] * 3, [-1, 0, -1], [-1, -1, 1], [-1, 0, 0])
            if fits and in_runs:
                sides = tuple((k.side, v.side) for k, v in zip(ks, vs, strict=True))
                totals[sides] = (sum(c.cost for c in (*ks, *vs)), sum(c.harm for c in (*ks, *vs)))
    with patch("xquant_gguf.allocate._spend"):
        cost, harm = totals[tuple(allocate(keys, own, mapped, budget))]
    assert cost <= budget
    assert harm <= min(h for c, h in totals.values() if c <= cost) + 1e-9
    spent, less = totals[tuple(allocate(keys, own, mapped, budget))]
    assert spent <= budget
    assert less <= harm


def test_the_smallest_cache_is_over_the_budget() -> None:
    choice = [Choice(Side(1, 128), 2.0, 0.1)]
    with pytest.raises(ValueError, match="the smallest cache costs 4, more than the budget of 3"):
        allocate([choice], [choice], [[]], 3.0)
    with pytest.raises(ValueError, match="more than the budget"):
        spread([1.0], 2, 1.5, float)


@pytest.mark.parametrize("bits", [1.0, 1.4, 2.0, 2.5, 3.0, 3.9])
def test_data_free_plans_use_their_budget(bits: float) -> None:
    plan = data_free(SHAPES, Budget(bits))
    assert bits - 0.15 < plan.true_bits(SHAPES) <= bits
    assert sum(x.k.bits for x in plan.layers) >= sum(x.v.bits for x in plan.layers)
    plan = data_free(SHAPES, Budget(bits - 0.3, equivalent=True))
    assert bits - 0.45 < plan.equivalent_bits() <= bits - 0.3


def test_costs_are_those_of_the_blocks() -> None:
    for bits in (2.0, 3.0):
        budget = Budget(bits)
        plan = data_free(SHAPES, budget)
        cost = sum(
            budget.cost(x.k, s, True) + budget.cost(x.v, s, False) for x, s in zip(plan.layers, SHAPES, strict=True)
        )
        assert cost / budget.total(SHAPES) * bits == pytest.approx(plan.true_bits(SHAPES))
