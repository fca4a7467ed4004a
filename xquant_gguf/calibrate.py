"""Calibration: the plan of least harm for a model under a budget, from a short text.

For each layer and side, the error that every choice of codes makes in the attention's output is computed from the
model's own queries, keys and values (harm).  One run of the model with coarse codes of that side alone measures the KL
divergence from F16 that comes of it; all other choices follow from their errors.  Values may be predicted from those of
the layer before, or the one before that, by a linear map that is fitted to them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from xquant_gguf.allocate import Choice, allocate, spread
from xquant_gguf.harm import Attention, fit_map, guess, read_back, stored
from xquant_gguf.metadata import Key, Provenance, plan_keys
from xquant_gguf.plan import PAGE, Layer, Plan, Shape, Side, ValueMap, block_bytes, shortest
from xquant_gguf.probe import Probe, Rows, Seen, Where
from xquant_gguf.sizes import model_layers

TEXT = Path(__file__).parent / "data" / "calibration.txt"
PASSAGES, PREFIX, SCORED = 3, 768, 80
"""Passages of the text, at most; the tokens of each whose keys and values are changed, and those after them whose
answers are compared.  What a layer's attention is for differs from passage to passage: one alone misleads."""
LEAST = 1280
"""Tokens that a text must have."""
COARSE = 1
"""Bits of the codes whose harm is measured by a run."""
NOISE = 0.0003
"""Standard deviation of a run's KL divergence, from rounding in the model's own products."""
ENOUGH = 0.01
"""Expected KL divergence of one side of a layer above which it is said to want more bits."""
FLOORS = 5
"""Runs that measure what the least change of a layer causes by rounding alone, spread over the layers."""


@lru_cache(maxsize=1)
def _preset_sides() -> tuple[dict[int, Side], dict[int, Side]]:
    """Keys and values of the presets, by bits."""
    layers = [Plan.from_preset(name, 1).layers[0] for name in ("xquant", "xquant-small", "xquant-tiny")]
    return {layer.k.bits: layer.k for layer in layers}, {layer.v.bits: layer.v for layer in layers}


def key_side(bits: int, group: int = PAGE, param: str = "f16") -> Side:
    """Keys as the presets store them; 1 bit as 2."""
    return replace(_preset_sides()[0][max(bits, 2)], bits=bits, group=group, param=param)


def value_side(bits: int, source: int = -1) -> Side:
    """Values as the presets store them, more than 2 bits as 2; source: the layer that predicts them."""
    if bits == 0:
        return Side(0, 0, "minmax", "f16", True, source=source)
    return replace(_preset_sides()[1][min(bits, 2)], bits=bits, source=source)


@dataclass(frozen=True)
class Budget:
    """bits: true bits a value, or, if equivalent, bits of codes alone (arXiv 2510.11236)."""

    bits: float
    equivalent: bool = False

    def cost(self, side: Side, shape: Shape, is_k: bool) -> float:
        """What one side of one layer costs."""
        if self.equivalent:
            return side.bits / 2
        none = Side(0, PAGE)  # stores one F16 number for each channel of K or token of V
        layer = Layer(side, none) if is_k else Layer(none, side)
        other = 2 * PAGE if is_k else 2 * shape.d
        return float((block_bytes(layer, shape) - other) * shape.heads)

    def total(self, shapes: Sequence[Shape]) -> float:
        """What all layers may cost together."""
        if self.equivalent:
            return self.bits * len(shapes)
        return self.bits / 8 * sum(PAGE * (s.d + s.e) * s.heads for s in shapes)


@dataclass(frozen=True)
class Short:
    """One side of a layer that wants more than the budget gave it.

    name: "k" or "v"; harm: KL divergence that is expected of its bits alone; wanted: bits that would bring it below
    ENOUGH, or the most there are.
    """

    layer: int
    name: str
    bits: int
    harm: float
    wanted: int


@dataclass(frozen=True)
class Calibration:
    """A plan and what is known of it.

    sensitivity: {"k", "v"}: KL divergence that 1-bit codes of each layer alone cause, less the noise of rounding.
    short: what should have more bits.
    """

    plan: Plan
    layers: list[int]
    n_layers: int
    shapes: list[Shape]
    made_by: Provenance
    sensitivity: dict[str, list[float]]
    short: tuple[Short, ...] = ()

    def keys(self) -> dict[str, Key]:
        """The GGUF keys."""
        return plan_keys(self.plan, self.layers, self.n_layers, self.made_by)

    def to_dict(self) -> dict[str, Any]:
        """The plan and its bits, the model's numbers of its layers, their sensitivity, and what made it."""
        bits = {"true_bits": self.plan.true_bits(self.shapes), "equivalent_bits": self.plan.equivalent_bits()}
        made = {"layers": self.layers, "sensitivity": self.sensitivity, "made_by": asdict(self.made_by)}
        return {**bits, **made, "plan": self.plan.to_dict()}


def calibrate(
    model_path: str,
    budget: Budget,
    *,
    text: str | None = None,
    n_threads: int | None = None,
    maps: bool = True,
    progress: bool = True,
) -> Calibration:
    """The plan of least harm for a model under a budget.

    text: a few thousand tokens; None: a built-in one.  maps: whether layers may predict values from others.  Raises
    ValueError if the text is too short, the budget too small, or the model cannot have an XQuant cache.
    """
    text = TEXT.read_text() if text is None else text
    with Probe(str(model_path), n_ctx=PREFIX + PAGE, n_threads=n_threads) as probe:
        tokens = probe.tokenize(text)[: PASSAGES * (PREFIX + SCORED)]
        if len(tokens) < LEAST:
            raise ValueError(f"the text has {len(tokens)} tokens, must have at least {LEAST}")
        passages = len(tokens) // (PREFIX + SCORED)
        steps = passages * (2 * len(probe.layers) + FLOORS + 3) + 2 * len(probe.layers) + 1
        with tqdm(total=steps, unit="step", disable=None if progress else True) as bar:
            bar.set_description("measuring layers")
            seen, by_passage = [], []
            for first in range(0, passages * (PREFIX + SCORED), PREFIX + SCORED):
                end = first + PREFIX
                seen.append(probe.read(tokens[first:end], tokens[end : end + SCORED]))
                bar.update(3)
                by_passage.append(measured(probe, bar.update))
            sensitivity = {name: list(np.mean([kld[name] for kld in by_passage], 0)) for name in "kv"}
            bar.set_description("comparing choices")
            with threadpool_limits(1, "blas"):  # small products: threads that wait for each other would cost more
                choices = Choices(seen, probe.shapes, maps, bar.update)
            plan = choices.plan(budget, sensitivity)
            bar.set_description("measuring the plan")
            kld = float(probe.kld(choices.read_back(plan, seen[-1])).mean())
            bar.update()
        plan = replace(plan, expected_kld=shortest(max(kld, 0.0)))
        made_by = Provenance(_tool(), hashlib.sha256(text.encode()).hexdigest(), passages * (PREFIX + SCORED))
        short = tuple(choices.short(plan, sensitivity))
        return Calibration(plan, probe.layers, probe.n_layers, probe.shapes, made_by, sensitivity, short)


def unmeasured(model_path: str, budget: Budget, preset: str | None = None) -> Calibration:
    """A preset for a model, or else what data_free makes of the budget; no weights are loaded."""
    shapes, layers, n_layers = model_layers(str(model_path))
    plan = Plan.from_preset(preset, len(layers)) if preset else data_free(shapes, budget)
    return Calibration(plan, layers, n_layers, shapes, Provenance(f"{_tool()} {preset or 'data-free'}"), {})


def _tool() -> str:
    return f"xquant-gguf {version('xquant-gguf')}"


def _coarse(name: str) -> Side:
    return key_side(COARSE) if name == "k" else value_side(COARSE)


def measured(probe: Probe, done: Callable[[], object]) -> dict[str, list[float]]:
    """KL divergence that coarse codes of one side of each layer alone cause, less what any change does.

    The least change of a layer is multiplied by the rounding of activations in all later products.
    """
    n = len(probe.layers)
    places = np.unique(np.linspace(0, n - 1, FLOORS).astype(int))
    floors = []
    for i in places:
        rows = probe.rows[i, "v"][:, : probe.n_prefix].copy()
        rows[:, -1] *= np.float16(1.01)
        floors.append(float(probe.kld({(i, "v"): rows}).mean()))
        done()
    floor = np.interp(np.arange(n), places, floors)
    out: dict[str, list[float]] = {"k": [], "v": []}
    for i in range(n):
        for name, kld in out.items():
            rows = read_back(_coarse(name), probe.rows[i, name][:, : probe.n_prefix], name)
            kld.append(max(float(probe.kld({(i, name): rows}).mean() - floor[i]), 0.0))
            done()
    return out


class Choices:
    """All choices of all layers with their errors; done: called twice for each layer."""

    def __init__(self, seen: Sequence[Seen], shapes: Sequence[Shape], maps: bool, done: Callable[[], object]) -> None:
        self.seen, self.shapes = seen, shapes
        self.fits: dict[tuple[int, int, int], ValueMap] = {}
        stores = ((PAGE, "f16"), (64, "f16"), (PAGE, "log8"), (64, "log8"))
        keys = [key_side(bits, *store) for store in stores for bits in (1, 2, 3, 4)]
        own = [value_side(bits) for bits in (0, 1, 2, 3, 4)]
        n = len(self.shapes)
        self.keys: list[list[Choice]] = []
        self.values: list[list[Choice]] = []
        self.mapped: list[list[Choice]] = []
        self.coarse: dict[str, list[float]] = {"k": [], "v": []}
        for i in range(n):
            attention = [Attention(x.queries[i], x.rows[i, "k"], x.rows[i, "v"]) for x in seen]
            for name, errors in self.coarse.items():
                errors.append(self._choice(attention, i, name, _coarse(name)).harm)
            self.keys.append([self._choice(attention, i, "k", side) for side in keys])
            done()
            self.values.append([self._choice(attention, i, "v", side) for side in own])
            self.mapped.append(list(self._mapped(attention, i)) if maps else [])
            done()

    def _back(self, x: Seen, i: int, name: str, side: Side, bits: int) -> Rows:
        """What a passage's pages give back; bits: of the source's values, if the side has one."""
        if side.source < 0:
            return read_back(side, x.prefix(i, name), name)
        value_map = self.fits[i, side.source, bits]
        return read_back(
            side, x.prefix(i, name), name, guess(value_map, stored(x.prefix(side.source, name), value_side(bits)))
        )

    def _choice(self, attention: Sequence[Attention], i: int, name: str, side: Side, bits: int = 0) -> Choice:
        errors = (a.error(name, self._back(x, i, name, side, bits)) for a, x in zip(attention, self.seen, strict=True))
        return Choice(side, 0.0, sum(errors), bits)

    def _mapped(self, attention: Sequence[Attention], i: int) -> Iterator[Choice]:
        """Values of layer i, predicted from the layer before or the one before that."""
        for source in range(max(i - 2, 0), i):
            ours, other = self.shapes[i], self.shapes[source]
            if (ours.e, ours.heads) != (other.e, other.heads):
                continue
            for bits in (1, 2, 3):
                sources = [stored(x.prefix(source, "v"), value_side(bits)) for x in self.seen]
                rows = np.concatenate([x.prefix(i, "v") for x in self.seen], 1)
                self.fits[i, source, bits] = fit_map(np.concatenate(sources, 1), rows)
                for side in (value_side(b, source) for b in (0, 1, 2, 3)):
                    yield self._choice(attention, i, "v", side, bits)

    def plan(self, budget: Budget, sensitivity: Mapping[str, Sequence[float]]) -> Plan:
        """The plan of least harm; sensitivity: KL divergence of coarse codes, {"k", "v"}: [layer]."""
        gain = _gains(sensitivity, self.coarse)

        def priced(options: Sequence[Sequence[Choice]], name: str) -> list[list[Choice]]:
            return [
                [replace(c, cost=budget.cost(c.side, shape, name == "k"), harm=c.harm * g) for c in layer]
                for layer, shape, g in zip(options, self.shapes, gain[name], strict=True)
            ]

        total = budget.total(self.shapes)
        sides = allocate(priced(self.keys, "k"), priced(self.values, "v"), priced(self.mapped, "v"), total)
        base = Plan.from_preset("xquant", len(self.shapes))
        maps = {i: self.fits[i, v.source, sides[v.source][1].bits] for i, (_, v) in enumerate(sides) if v.source >= 0}
        plan = replace(base, preset="calibrated", layers=tuple(Layer(k, v) for k, v in sides), maps=maps)
        plan.check(self.shapes)
        return plan

    def short(self, plan: Plan, sensitivity: Mapping[str, Sequence[float]]) -> Iterator[Short]:
        """The sides of a plan that want more bits."""
        gain = _gains(sensitivity, self.coarse)
        for i, layer in enumerate(plan.layers):
            for name, side, options in (
                ("k", layer.k, self.keys[i]),
                ("v", layer.v, [*self.values[i], *self.mapped[i]]),
            ):
                bits = plan.layers[side.source].v.bits if side.source >= 0 else 0
                harm = {c.side.bits: c.harm * gain[name][i] for c in options if _like(c, side, bits)}
                if harm[side.bits] > ENOUGH and side.bits < max(harm):
                    wanted = min((b for b, h in harm.items() if b > side.bits and h <= ENOUGH), default=max(harm))
                    yield Short(i, name, side.bits, harm[side.bits], wanted)

    def read_back(self, plan: Plan, x: Seen) -> dict[Where, Rows]:
        """Keys and values of a passage as a plan's pages give them back."""
        out = {}
        for i, layer in enumerate(plan.layers):
            bits = plan.layers[layer.v.source].v.bits if layer.v.source >= 0 else 0
            out[i, "k"] = self._back(x, i, "k", layer.k, 0)
            out[i, "v"] = self._back(x, i, "v", layer.v, bits)
        return out


def _like(choice: Choice, side: Side, source_bits: int) -> bool:
    """Whether a choice differs from a side in its bits alone."""
    other = choice.side
    stored = other.rotate or (other.group, other.param) == (side.group, side.param)  # values differ in nothing else
    return stored and other.source == side.source and choice.source_bits == source_bits


def _gains(measured: Mapping[str, Sequence[float]], errors: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """KL divergence for an error of 1, by side and layer.

    A measurement that is no larger than its noise says little: it is moved to what the layer's other side, and all
    layers together, let one expect.
    """
    kld = np.array([measured["k"], measured["v"]])
    error = np.maximum(np.array([errors["k"], errors["v"]]), 1e-12)

    def moved(harm: Any, expected: Any) -> Any:
        weight = NOISE**2 / (NOISE**2 + expected**2)
        return (1 - weight) * harm + weight * expected

    both = error.sum(0)
    layer = moved(kld.sum(0), kld.sum() / len(both)) / both
    gain = moved(kld, layer * error) / error
    return {"k": list(gain[0]), "v": list(gain[1])}


def data_free(shapes: Sequence[Shape], budget: Budget) -> Plan:
    """A plan from the architecture alone: keys two bits above values while the budget lasts, spread evenly.

    The best eta for each bit width is that of a Gaussian group (key_side, value_side).
    """
    n = len(shapes)
    ladder = [
        Layer(key_side(k), value_side(v)) for k, v in ((1, 0), (1, 1), (2, 1), (3, 1), (3, 2), (4, 2), (4, 3), (4, 4))
    ]
    costs = {
        layer: sum(budget.cost(layer.k, s, True) + budget.cost(layer.v, s, False) for s in shapes) / n
        for layer in ladder
    }
    layers = spread(ladder, n, budget.total(shapes), costs.__getitem__)
    plan = replace(Plan.from_preset("xquant", n), preset="data-free", layers=tuple(layers))
    plan.check(shapes)
    return plan
