"""Which codes to give each layer: the choices there are, what each costs and harms, and the best under a budget.

Harm is additive over layers and sides: small independent errors of the attention's output add up in the squares.  The
best plan under a budget minimises harm + price * cost; the price is found by bisection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from xquant_gguf.plan import Side

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """One way to store one side of one layer.

    cost: in the budget's unit; harm: expected KL divergence.  source_bits: of the layer that side.source names, for
    which the harm was computed.
    """

    side: Side
    cost: float
    harm: float
    source_bits: int = 0


Values = Sequence[Sequence[Choice]]


def _best(choices: Sequence[Choice], price: float) -> Choice:
    return min(choices, key=lambda c: c.harm + price * c.cost)


def _best_values(own: Values, mapped: Values, price: float, longest: int) -> list[Choice]:
    """The best choice for each layer's values: runs of one layer with own codes and up to `longest` mapped from it."""
    n = len(own)
    best: list[tuple[float, list[Choice]]] = [(float("inf"), []) for _ in range(n + 1)]
    best[0] = (0.0, [])
    for first in range(n):
        before, chosen = best[first]
        for source in own[first]:
            run, total = [source], before + source.harm + price * source.cost
            for end in range(first + 1, min(first + longest, n - 1) + 2):
                if total < best[end][0]:
                    best[end] = (total, chosen + run)
                if end == n:
                    break
                fitting = [c for c in mapped[end] if c.side.source == first and c.source_bits == source.side.bits]
                if not fitting:
                    break
                choice = _best(fitting, price)
                run, total = [*run, choice], total + choice.harm + price * choice.cost
    return best[n][1]


def allocate(keys: Values, own: Values, mapped: Values, budget: float, longest: int = 2) -> list[tuple[Side, Side]]:
    """(K, V) of each layer, of least harm, with a total cost of at most `budget`.

    keys, own, mapped: the choices of each layer; mapped: those whose values an earlier layer predicts.  ValueError if
    the cheapest plan is over the budget.
    """

    def at(price: float) -> tuple[list[Choice], list[Choice]]:
        return [_best(choices, price) for choices in keys], _best_values(own, mapped, price, longest)

    def cost(plan: tuple[list[Choice], list[Choice]]) -> float:
        return sum(choice.cost for side in plan for choice in side)

    low, high = 0.0, 1e6
    cheapest = at(high)
    if cost(cheapest) > budget:
        raise ValueError(f"the smallest cache costs {cost(cheapest):.4g}, more than the budget of {budget:.4g}")
    for _ in range(80):
        middle = (low * high) ** 0.5 if low > 0 else high * 1e-3
        if cost(at(middle)) <= budget:
            high = middle
        else:
            low = middle
        if high < 1e-15 or (low > 0 and high / low < 1 + 1e-9):
            break
    key_plan, value_plan = at(high)
    left = budget - cost((key_plan, value_plan))
    _spend(key_plan, keys, left)
    return [(k.side, v.side) for k, v in zip(key_plan, value_plan, strict=True)]


def _spend(plan: list[Choice], choices: Values, left: float) -> None:
    """Upgrades single choices, the best gain for its cost first, as long as they fit into what is left."""
    while True:
        steps = [
            ((plan[i].harm - c.harm) / (c.cost - plan[i].cost), i, c)
            for i, options in enumerate(choices)
            for c in options
            if 0 < c.cost - plan[i].cost <= left and c.harm < plan[i].harm
        ]
        if not steps:
            return
        _, i, choice = max(steps, key=lambda step: step[0])
        left -= choice.cost - plan[i].cost
        plan[i] = choice


def spread(levels: Sequence[T], n_layers: int, budget: float, cost: Callable[[T], float]) -> list[T]:
    """One level for each layer, using up the budget: the two nearest levels, spread evenly over the layers."""
    below = max((level for level in levels if cost(level) * n_layers <= budget), key=cost, default=None)
    if below is None:
        raise ValueError(f"the smallest cache costs more than the budget of {budget:.4g}")
    above = min((level for level in levels if cost(level) > cost(below)), key=cost, default=below)
    gap = cost(above) - cost(below)
    n_above = int((budget - cost(below) * n_layers) / gap + 1e-9) if gap > 0 else 0
    return [above if (i + 1) * n_above // n_layers > i * n_above // n_layers else below for i in range(n_layers)]
