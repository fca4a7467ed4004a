"""Calibration: the plan of least harm for a model under a budget, from a short text.

For each layer and side, one run measures the KL divergence from F16 that coarse codes of that side alone cause, at
passages from all over the text.  The codec's own squared error on the model's keys and values then says what every
other choice would cause.  Values may be predicted from those of the layer before, or the one before that, by a linear
map that is fitted to them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from xquant_gguf import codec
from xquant_gguf.allocate import Choice, allocate, spread
from xquant_gguf.inspect import model_layers
from xquant_gguf.metadata import Key, Provenance, plan_keys
from xquant_gguf.plan import PAGE, Layer, Plan, Shape, Side, ValueMap, block_bytes, shortest
from xquant_gguf.probe import Probe, Reading, Rows, check_layers

TEXT = Path(__file__).parent / "data" / "calibration.txt"
FIT_TOKENS = 2048
"""Tokens whose keys and values are looked at."""
EVERY, PASSAGE = 2 * PAGE, 32
"""A passage that is scored when one side is measured begins at each how many-th token, and its tokens."""
CHECK_TOKENS, CHECK_SKIP = 5 * PAGE, 2 * PAGE
"""Tokens, the text's last, on which the plan is measured, and the first of them that are not scored."""
RIDGE = 0.01
"""Of the mean eigenvalue, added when a map is fitted."""
SHRINK = 0.25
"""How far one measurement is moved to the mean of all: most layers do less harm than the noise of one run."""
ERROR_PAGES = 6
"""Pages on which the codec's error is measured."""

VALUE_ETA = {3: 0.04, 4: 0.01}
"""Where the fit of values begins that no preset has: the least squared error over Gaussian groups of 64 and 128."""

PROBE_BITS = 1
"""Bits of the codes whose harm is measured; that of all others follows from the codec's errors."""


@lru_cache(maxsize=1)
def _preset_sides() -> tuple[dict[int, Side], dict[int, Side]]:
    """Keys and values of the presets, by bits."""
    layers = [Plan.from_preset(name, 1).layers[0] for name in ("xquant", "xquant-small", "xquant-tiny")]
    return {layer.k.bits: layer.k for layer in layers}, {layer.v.bits: layer.v for layer in layers}


def key_side(bits: int, group: int = PAGE, param: str = "f16") -> Side:
    """Keys as the presets store them; 1 bit as 2."""
    return replace(_preset_sides()[0][max(bits, 2)], bits=bits, group=group, param=param)


def value_side(bits: int, source: int = -1) -> Side:
    """Values as the presets store them, more than 2 bits as 2, but for eta; source: the layer that predicts them."""
    if bits == 0:
        return Side(0, 0, "minmax", "f16", True, source=source)
    preset = _preset_sides()[1][min(bits, 2)]
    return replace(preset, bits=bits, source=source, eta=VALUE_ETA.get(bits, preset.eta))


NOTHING: Rows = np.empty((0, 0, 0), np.float16)
"""V of a latent layer."""
PROBES: dict[str, Callable[[int], Side]] = {"k": key_side, "v": value_side}


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


def _error(side: Side, rows: NDArray[np.float16], name: str, predicted: Sequence[Any] | None = None) -> float:
    """Squared error of a side on some pages of one head, rows [token][width]."""
    total = 0.0
    for i, first in enumerate(_pages(len(rows))):
        page = rows[first : first + PAGE]
        if name == "k":
            back = codec.unseal_k(side, page.shape[1], *codec.seal_k(side, page))
        else:
            guess = None if predicted is None else predicted[i]
            own = replace(side, source=-1)
            back = codec.unseal_v(own, page.shape[1], *codec.seal_v(own, page, predicted=guess), guess)
        total += float(((back.astype(np.float32) - page.astype(np.float32)) ** 2).sum())
    return total


def _read_back(side: Side, rows: Rows, name: str) -> Rows:
    """Rows as sealed pages would give them back, all but those of the first page."""
    seal, unseal = (codec.seal_k, codec.unseal_k) if name == "k" else (codec.seal_v, codec.unseal_v)
    out = rows.copy()
    for head in out:
        for first in range(PAGE, len(head), PAGE):
            page = head[first : first + PAGE]
            page[:] = unseal(side, head.shape[1], *seal(side, page))
    return out


def _pages(n_tokens: int) -> list[int]:
    """First tokens of the pages that errors are measured on, spread evenly; the first page stays F16 in use."""
    pages = np.linspace(1, n_tokens // PAGE - 1, ERROR_PAGES).astype(int)
    return [int(p) * PAGE for p in pages]


def _stored(rows: Rows, bits: int) -> NDArray[np.float32]:
    """What a layer with own codes stores of its values, [head][token][e], in the rotated space."""
    side = value_side(bits)
    eye = np.eye(rows.shape[2], dtype=np.float32)

    def page(x: NDArray[np.float16]) -> NDArray[np.float32]:
        return codec.predict_v(side, x.shape[1], *codec.seal_v(side, x), eye).T

    return np.stack([np.concatenate([page(h[i : i + PAGE]) for i in range(0, len(h), PAGE)]) for h in rows])


@dataclass(frozen=True)
class _Fit:
    value_map: ValueMap
    predicted: list[list[NDArray[np.float32]]]  # [head][page of _pages] -> [e][PAGE]


def fit_map(stored: NDArray[np.float32], rows: Rows) -> _Fit:
    """The map that predicts a layer's values, rows [head][token][e], from what its source stores of its own.

    Each head takes the one source head that leaves least over.
    """
    heads, weights, predicted = [], [], []
    grams = [u.T @ u for u in stored]
    for x in rows:
        y = codec.hadamard(x.astype(np.float32))
        fits = []
        for h, (u, gram) in enumerate(zip(stored, grams, strict=True)):
            w = np.linalg.solve(gram + RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)), u.T @ y)
            fits.append((float(((y - u @ w) ** 2).sum()), h, w.astype(np.float16)))
        _, head, weight = min(fits, key=lambda fit: fit[0])
        heads.append(head)
        weights.append(weight.astype("<f2").tobytes())
        guess = stored[head] @ weight.astype(np.float32)
        predicted.append([np.ascontiguousarray(guess[i : i + PAGE].T) for i in _pages(len(guess))])
    return _Fit(ValueMap(tuple(heads), b"".join(weights)), predicted)


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
    with Probe(str(model_path), n_threads) as probe:
        tokens = probe.tokenize(text)[: FIT_TOKENS + CHECK_TOKENS]
        if len(tokens) < 2 * CHECK_TOKENS:
            raise ValueError(f"the text has {len(tokens)} tokens, must have at least {2 * CHECK_TOKENS}")
        n_fit = min(FIT_TOKENS, len(tokens)) // PAGE * PAGE
        starts = range(EVERY, min(n_fit, len(tokens) - PASSAGE) + 1, EVERY)
        with tqdm(total=2 * len(probe.layers) + 2, unit="run", disable=None if progress else True) as bar:
            bar.set_description("reading keys and values")
            with probe.reading(tokens, n_fit, starts, PASSAGE) as reading:
                bar.update()
                bar.set_description("measuring layers")
                sensitivity = {name: _sensitivity(reading, name, bar) for name in "kv"}
            bar.set_description("choosing")
            rows = {name: [reading.rows.get((i, name), NOTHING) for i in range(len(probe.layers))] for name in "kv"}
            plan = _Choices(budget, probe.shapes, rows, sensitivity, maps).plan()
            kld = float(probe.kld(replace(plan, window=0), tokens[-CHECK_TOKENS:], CHECK_SKIP).mean())
            bar.update()
        plan = replace(plan, expected_kld=shortest(kld))
        made_by = Provenance(_tool(), hashlib.sha256(text.encode()).hexdigest(), len(tokens))
        return Calibration(plan, probe.layers, probe.n_layers, probe.shapes, made_by, sensitivity)


def unmeasured(model_path: str, budget: Budget, preset: str | None = None) -> Calibration:
    """A preset for a model, or else what data_free makes of the budget; no weights are loaded."""
    shapes, layers, n_layers = model_layers(str(model_path))
    check_layers(model_path, layers)
    plan = Plan.from_preset(preset, len(layers)) if preset else data_free(shapes, budget)
    return Calibration(plan, layers, n_layers, shapes, Provenance(f"{_tool()} {preset or 'data-free'}"), {})


def _tool() -> str:
    return f"xquant-gguf {version('xquant-gguf')}"


def _sensitivity(reading: Reading, name: str, bar: Any) -> list[float]:
    """KL divergence that coarse codes of one side of each layer alone cause."""
    side, out = PROBES[name](PROBE_BITS), []
    for i in range(reading.n_layers):
        rows = reading.rows.get((i, name))
        out.append(0.0 if rows is None else float(reading.kld({(i, name): _read_back(side, rows, name)}).mean()))
        bar.update()
    return out


class _Choices:
    """All choices of all layers with their costs and harms."""

    def __init__(
        self, budget: Budget, shapes: Sequence[Shape], rows: Any, sensitivity: dict[str, list[float]], maps: bool
    ) -> None:
        self.budget, self.shapes, self.rows = budget, shapes, rows
        self.fits: dict[tuple[int, int, int], _Fit] = {}
        # harm of a squared error of 1, by layer
        self.harm = {name: self._harm(name, probe(PROBE_BITS), sensitivity[name]) for name, probe in PROBES.items()}
        stores = ((PAGE, "f16"), (64, "f16"), (PAGE, "log8"))
        keys = [key_side(bits, *store) for store in stores for bits in (1, 2, 3, 4)]
        self.keys = [list(self._own(i, "k", keys)) for i in range(len(shapes))]
        own = [value_side(bits) for bits in (0, 1, 2, 3, 4)]
        self.values = [list(self._own(i, "v", own)) for i in range(len(shapes))]
        self.mapped: list[list[Choice]] = [[] for _ in shapes]
        if maps:
            for i in range(len(shapes)):
                self._map_from(i)

    def _harm(self, name: str, probe: Side, measured: Sequence[float]) -> list[float]:
        errors = [sum(_error(probe, head, name) for head in heads) or 1.0 for heads in self.rows[name]]
        return [weight / error for weight, error in zip(_shrunk(measured), errors, strict=True)]

    def _own(self, i: int, name: str, sides: Sequence[Side]) -> Iterator[Choice]:
        for side in sides:
            error = sum(_error(side, head, name) for head in self.rows[name][i])
            cost = self.budget.cost(side, self.shapes[i], name == "k")
            yield Choice(side, cost, self.harm[name][i] * error)

    def _map_from(self, source: int) -> None:
        """Adds the choices of the next layers whose values layer `source` predicts."""
        shape, values = self.shapes[source], self.rows["v"]
        if not shape.e:
            return
        for bits in (1, 2, 3):
            stored = _stored(values[source], bits)
            for i in range(source + 1, min(source + 3, len(self.shapes))):
                if (self.shapes[i].e, shape.heads) != (shape.e, self.shapes[i].heads):
                    continue
                fit = fit_map(stored, values[i])
                self.fits[i, source, bits] = fit
                for side in (value_side(b, source) for b in (0, 1, 2, 3)):
                    error = sum(_error(side, head, "v", fit.predicted[h]) for h, head in enumerate(values[i]))
                    cost = self.budget.cost(side, self.shapes[i], False)
                    self.mapped[i].append(Choice(side, cost, self.harm["v"][i] * error, bits))

    def plan(self) -> Plan:
        sides = allocate(self.keys, self.values, self.mapped, self.budget.total(self.shapes))
        base = Plan.from_preset("xquant", len(self.shapes))
        maps = {
            i: self.fits[i, v.source, sides[v.source][1].bits].value_map
            for i, (_, v) in enumerate(sides)
            if v.source >= 0
        }
        plan = replace(base, preset="calibrated", layers=tuple(Layer(k, v) for k, v in sides), maps=maps)
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
