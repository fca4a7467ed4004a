"""Calibration: the plan of least harm for a model under a budget, from a short text.

For each layer and side, one run measures the KL divergence from F16 that coarse codes of that side alone cause, at
passages from all over the text, a window before each kept exact.  The codec's own squared error on the model's keys and
values then says what every other choice would cause, and one run for each width, in all layers at once, by how much
that is wrong.  Values may be predicted from those of the layer before, or the one before that, by a linear map that is
fitted to them; its error is that on pages which it was not fitted to.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from xquant_gguf.allocate import Choice, allocate, spread
from xquant_gguf.inspect import model_layers
from xquant_gguf.metadata import Key, Provenance, plan_keys
from xquant_gguf.plan import PAGE, Layer, Plan, Shape, Side, block_bytes, shortest
from xquant_gguf.probe import Probe, Reading, Rows, Where, check_layers
from xquant_gguf.sides import (
    KeyForm,
    MapFit,
    fit_map,
    key_side,
    read_back,
    read_back_keys,
    squared_error,
    stored_values,
    value_side,
)
from xquant_gguf.transforms import coordinates

TEXT = Path(__file__).parent / "data" / "calibration.txt"
FIT_TOKENS = 3072
"""Tokens whose keys and values are looked at."""
PASSAGES, PASSAGE, FIRST = 8, 32, 4 * PAGE
"""Most passages that are scored when one side is measured, spread over the text, their tokens, the first's place."""
CHECK_TOKENS, CHECK_SKIP = 5 * PAGE, 2 * PAGE
"""Tokens, the text's last, on which the plan is measured, and the first of them that are not scored."""
SHRINK = 0.25
"""How far one measurement is moved to the mean of all: most layers do less harm than the noise of one run."""
LEAST_OF_SAID = 0.25
"""The smallest share of what errors say that codes of a width may be measured to do: the rest would be noise."""
PROBE_BITS = 1
"""Bits of the codes whose harm is measured by layer; that of all others follows from the codec's errors."""
FORM_BITS = 3
"""Bits of the keys that show in which coordinates to store them."""
WORTH = 0.8
"""How much of the harm of other coordinates matrices may do at most: they cost memory and time."""
GUESS_BITS = 2
"""Bits of the values from which others are predicted when that is measured."""
WIDTHS = (1, 2, 3, 4)
"""Bits of the codes whose harm is measured in all layers at once."""


NOTHING: Rows = np.empty((0, 0, 0), np.float16)
"""V of a latent layer."""


@dataclass(frozen=True)
class Budget:
    """bits: true bits a value, or, if equivalent, bits of codes alone (arXiv 2510.11236)."""

    bits: float
    equivalent: bool = False

    def cost(self, side: Side, shape: Shape, is_k: bool) -> float:
        """What one side of one layer costs."""
        if self.equivalent:
            return side.bits / 2 if shape.e else side.bits * is_k
        none = Side(0, PAGE)  # stores one F16 number for each channel of K or token of V
        layer = Layer(side, none) if is_k else Layer(none, side)
        other = 2 * PAGE * (shape.e > 0) if is_k else 2 * shape.d
        return float((block_bytes(layer, shape) - other) * shape.heads)

    def total(self, shapes: Sequence[Shape]) -> float:
        """What all layers may cost together."""
        if self.equivalent:
            return self.bits * len(shapes)
        return self.bits / 8 * sum(PAGE * (s.d + s.e) * s.heads for s in shapes)


@dataclass(frozen=True)
class Calibration:
    """A plan and what is known of it.

    sensitivity: {"k", "v"}: KL divergence that 1-bit codes of each layer alone cause, the noise of a run included; 0
    for V of latent layers, which is part of K.
    """

    plan: Plan
    layers: list[int]
    n_layers: int
    shapes: list[Shape]
    made_by: Provenance
    sensitivity: dict[str, list[float]]

    def keys(self) -> dict[str, Key]:
        """The GGUF keys."""
        return plan_keys(self.plan, self.layers, self.n_layers, self.made_by)

    def to_dict(self) -> dict[str, Any]:
        """The plan and its bits, the model's numbers of its layers, their sensitivity, and what made it."""
        bits = {f"{name}_bits": getattr(self.plan, f"{name}_bits")(self.shapes) for name in ("true", "equivalent")}
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
    text = TEXT.read_text(encoding="utf-8") if text is None else text
    with Probe(str(model_path), n_threads) as probe:
        tokens = probe.tokenize(text)[: FIT_TOKENS + CHECK_TOKENS]
        if len(tokens) < 2 * CHECK_TOKENS:
            raise ValueError(f"the text has {len(tokens)} tokens, must have at least {2 * CHECK_TOKENS}")
        n_fit = min(FIT_TOKENS, len(tokens)) // PAGE * PAGE
        last = min(n_fit, (len(tokens) - PASSAGE) // PAGE * PAGE)
        starts = range(FIRST, last + 1, max(-(-(last - FIRST) // (PASSAGES - 1) // PAGE), 1) * PAGE)
        n_runs = 2 * (len(probe.layers) + len(WIDTHS))
        with tqdm(total=n_runs + 6, unit="run", disable=None if progress else True) as bar:
            bar.set_description("reading keys and values")
            with probe.reading(tokens, n_fit, starts, PASSAGE, PAGE) as reading:
                bar.update()
                bar.set_description("measuring layers")
                forms = _forms(reading, probe.rotates, bar)
                measured = {name: _Measured.of(reading, name, forms, bar) for name in "kv"}
                guessed = _guessed(reading, probe.shapes) if maps else None
                bar.update()
            bar.set_description("choosing")
            plan = _Choices(budget, probe.shapes, reading.rows, forms, measured, guessed).plan()
            kld = float(probe.kld(replace(plan, window=0), tokens[-CHECK_TOKENS:], CHECK_SKIP).mean())
            bar.update()
        plan = replace(plan, expected_kld=shortest(kld))
        made_by = Provenance(_tool(), hashlib.sha256(text.encode()).hexdigest(), len(tokens))
        sensitivity = {name: found.by_layer for name, found in measured.items()}
        return Calibration(plan, probe.layers, probe.n_layers, probe.shapes, made_by, sensitivity)


def unmeasured(model_path: str, budget: Budget, preset: str | None = None) -> Calibration:
    """A preset for a model, or else what data_free makes of the budget; no weights are loaded."""
    shapes, layers, n_layers = model_layers(str(model_path))
    check_layers(model_path, layers)
    plan = Plan.from_preset(preset, len(layers)) if preset else data_free(shapes, budget)
    return Calibration(plan, layers, n_layers, shapes, Provenance(f"{_tool()} {preset or 'data-free'}"), {})


def _tool() -> str:
    return f"xquant-gguf {version('xquant-gguf')}"


def _side(name: str, bits: int, form: KeyForm) -> Side:
    return form.side(bits) if name == "k" else value_side(bits)


def _kld(reading: Reading, name: str, layers: Iterable[int], bits: int, forms: Sequence[KeyForm], bar: Any) -> float:
    """KL divergence that codes of one side of some layers cause."""
    changed = {}
    for i in layers:
        rows, side = reading.rows[i, name], _side(name, bits, forms[i])
        changed[i, name] = read_back_keys(side, rows, forms[i]) if name == "k" else read_back(side, rows, name)
    bar.update()
    return float(reading.kld(changed).mean())


def _forms(reading: Reading, rotates: Sequence[bool], bar: Any) -> list[KeyForm]:
    """In which coordinates the keys of all layers are stored, by what they do: rotated, as they come, or their own.

    rotates: where a Hadamard matrix may be.  Layers whose queries nobody added up have no coordinates of their own.
    """

    def harm(forms: Sequence[KeyForm]) -> float:
        return _kld(reading, "k", range(len(forms)), FORM_BITS, forms, bar)

    both = [KeyForm(turns) for turns in rotates], [KeyForm() for _ in rotates]
    least, simple = min(((harm(forms), forms) for forms in both), key=lambda one: one[0])
    own = [
        KeyForm(matrices=coordinates(reading.rows[i, "k"], reading.queries[i])) if i in reading.queries else form
        for i, form in enumerate(simple)
    ]
    return own if harm(own) < WORTH * least else simple


@dataclass(frozen=True)
class _Measured:
    """KL divergences that codes of one side cause: of PROBE_BITS in each layer alone, and of WIDTHS in all at once."""

    by_layer: list[float]
    by_width: list[float]

    @classmethod
    def of(cls, reading: Reading, name: str, forms: Sequence[KeyForm], bar: Any) -> _Measured:
        held = [i for i in range(reading.n_layers) if (i, name) in reading.rows]

        def kld(bits: int, layers: Sequence[int]) -> float:
            return _kld(reading, name, layers, bits, forms, bar)

        by_layer = [kld(PROBE_BITS, [i]) if i in held else 0.0 for i in range(reading.n_layers)]
        return cls(by_layer, [kld(bits, held) if held else 0.0 for bits in WIDTHS])


@dataclass(frozen=True)
class _Guessed:
    """What values that are nothing but what maps predict do, in some layers at once, and their errors, by layer."""

    kld: float
    errors: dict[int, float]


def _guessed(reading: Reading, shapes: Sequence[Shape]) -> _Guessed | None:
    """In every second layer.

    What is predicted is shorter than what is, which does more harm than codes of the same error do.
    """
    changed, errors = {}, {}
    for i in range(1, len(shapes), 2):
        if shapes[i].e == 0 or shapes[i] != shapes[i - 1]:
            continue
        rows = reading.rows[i, "v"]
        fit, side = fit_map(stored_values(reading.rows[i - 1, "v"], GUESS_BITS), rows), value_side(0, i - 1)
        changed[i, "v"] = read_back(side, rows, "v", fit.guesses)
        errors[i] = squared_error(side, rows, "v", fit.guesses)
    return _Guessed(float(reading.kld(changed).mean()), errors) if changed else None


class _Choices:
    """All choices of all layers with their costs and harms."""

    def __init__(
        self,
        budget: Budget,
        shapes: Sequence[Shape],
        rows: Mapping[Where, Rows],
        forms: Sequence[KeyForm],
        measured: dict[str, _Measured],
        guessed: _Guessed | None,
    ) -> None:
        """guessed: None: values are not predicted."""
        self.budget, self.shapes, self.forms = budget, shapes, forms
        # as they are stored
        self.rows = {name: [rows.get((i, name), NOTHING) for i in range(len(shapes))] for name in "kv"}
        self.rows["k"] = [form.stored(x) for x, form in zip(self.rows["k"], forms, strict=True)]
        self.fits: dict[tuple[int, int, int], MapFit] = {}
        self.errors: dict[tuple[int, str, Side], float] = {}
        # harm of a squared error of 1, by layer, and what it is to be multiplied by, by bits
        self.harm = {name: self._harm(name, found.by_layer) for name, found in measured.items()}
        self.factor = self._factors(measured, guessed)
        stores = ((PAGE, "f16"), (64, "f16"), (PAGE, "log8"))
        self.keys = [
            list(self._own(i, "k", [form.side(bits, *store) for store in stores for bits in WIDTHS]))
            for i, form in enumerate(forms)
        ]
        own = [value_side(bits) for bits in (0, *WIDTHS)]
        self.values = [list(self._own(i, "v", own)) for i in range(len(shapes))]
        self.mapped: list[list[Choice]] = [[] for _ in shapes]
        if guessed:
            for i in range(len(shapes)):
                self._map_from(i)

    def _errors(self, name: str, bits: int) -> list[float]:
        """Squared error of codes in each layer."""
        return [self._error(i, name, _side(name, bits, form)) for i, form in enumerate(self.forms)]

    def _error(self, i: int, name: str, side: Side) -> float:
        """Squared error of a layer's own codes; looked at once, though several ask."""
        if (i, name, side) not in self.errors:
            self.errors[i, name, side] = squared_error(side, self.rows[name][i], name)
        return self.errors[i, name, side]

    def _harm(self, name: str, measured: Sequence[float]) -> list[float]:
        errors = self._errors(name, PROBE_BITS)
        return [weight / (error or 1.0) for weight, error in zip(_shrunk(measured), errors, strict=True)]

    def _factors(self, measured: dict[str, _Measured], guessed: _Guessed | None) -> dict[str, dict[int, float]]:
        """What codes of a width did in many layers at once over what their errors say.

        The finest codes of values do next to nothing by themselves: what is measured of them beyond their errors, any
        change causes.
        """

        def factor(whole: float, parts: float) -> float:
            return max(whole - noise, LEAST_OF_SAID * parts) / (parts or 1.0)

        said = {
            name: [sum(map(operator.mul, self.harm[name], self._errors(name, bits))) for bits in WIDTHS]
            for name in measured
        }
        noise = max(measured["v"].by_width[-1] - said["v"][-1], 0.0)
        out = {}
        for name, found in measured.items():
            factors = map(factor, found.by_width, said[name])
            out[name] = dict(zip(WIDTHS, factors, strict=True))
            out[name][0] = out[name][WIDTHS[0]]
        if guessed:
            out["v"][0] = factor(guessed.kld, sum(self.harm["v"][i] * error for i, error in guessed.errors.items()))
        return out

    def _choice(self, i: int, name: str, side: Side, error: float, source_bits: int = 0) -> Choice:
        cost = self.budget.cost(side, self.shapes[i], name == "k")
        return Choice(side, cost, self.factor[name][side.bits] * self.harm[name][i] * error, source_bits)

    def _own(self, i: int, name: str, sides: Sequence[Side]) -> Iterator[Choice]:
        for side in sides:
            yield self._choice(i, name, side, self._error(i, name, side))

    def _map_from(self, source: int) -> None:
        """Adds the choices of the next layers whose values layer `source` predicts."""
        shape, values = self.shapes[source], self.rows["v"]
        if not shape.e:
            return
        for bits in (1, 2, 3):
            stored = stored_values(values[source], bits)
            for i in range(source + 1, min(source + 3, len(self.shapes))):
                if (self.shapes[i].e, shape.heads) != (shape.e, self.shapes[i].heads):
                    continue
                fit = fit_map(stored, values[i])
                self.fits[i, source, bits] = fit
                for side in (value_side(b, source) for b in (0, 1, 2, 3)):
                    error = squared_error(side, values[i], "v", fit.guesses)
                    self.mapped[i].append(self._choice(i, "v", side, error, bits))

    def plan(self) -> Plan:
        sides = allocate(self.keys, self.values, self.mapped, self.budget.total(self.shapes))
        base = Plan.from_preset("xquant", len(self.shapes))
        maps = {
            i: self.fits[i, v.source, sides[v.source][1].bits].value_map
            for i, (_, v) in enumerate(sides)
            if v.source >= 0
        }
        layers = tuple(Layer(k, v) for k, v in sides)
        transforms = {i: form.matrices.tobytes() for i, form in enumerate(self.forms) if form.matrices is not None}
        plan = replace(base, preset="calibrated", layers=layers, maps=maps, transforms=transforms)
        plan.check(self.shapes)
        return plan


def _shrunk(measured: Sequence[float]) -> list[float]:
    """Measurements less what any change causes (rounding in the model's own products), moved to their mean."""
    x = np.maximum(np.array(measured) - np.quantile(measured, 0.1), 0.0)
    return list((1 - SHRINK) * x + SHRINK * x.mean() + 1e-9)


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
