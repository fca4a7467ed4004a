"""What each layer of a cache stores: the plan object that presets, a dictionary, a JSON file or GGUF metadata fill in.

Presets, checks, sizes and the text form live in libxquant (native/cpu/plan.cpp); this module is their Python face.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from xquant_gguf import native

PAGE = 128
"""Tokens of a page."""
_NUMBERS = ("window", "pinned", "open_bits")
MADE = ("calibrated", "data-free")
"""What plans that no preset describes are called."""


@dataclass(frozen=True)
class Side:
    """What one layer stores of its keys or of its values (xq_side in native/include/xquant.h)."""

    bits: int
    group: int
    fit: str = "minmax"
    param: str = "f16"
    rotate: bool = False
    owner: int = -1
    eta: float = 0.0
    source: int = -1


@dataclass(frozen=True)
class Layer:
    """What one layer stores."""

    k: Side
    v: Side


@dataclass(frozen=True)
class ValueMap:
    """How the values of one layer are predicted from those of its source (Side.source).

    heads [KV head]: the KV head of the source that each is predicted from.  weight: F16 numbers, little-endian,
    [KV head][e of the source][e].
    """

    heads: tuple[int, ...]
    weight: bytes


@dataclass(frozen=True)
class Shape:
    """Head widths and number of KV heads of one layer; heads = 0: the layer has no cache.

    e = 0: a latent layer (MLA), which stores keys alone: its values are channels of them.
    """

    d: int
    e: int
    heads: int


def _names(function: str) -> tuple[str, ...]:
    ffi, lib = native.load()
    names: str = ffi.string(getattr(lib, function)()).decode()
    return tuple(names.split(","))


def preset_names() -> tuple[str, ...]:
    """Names of the presets, each also a kv_type."""
    return _names("xq_plan_preset_names")


def fit_names() -> tuple[str, ...]:
    """What Side.fit may be, in the order of enum xq_fit."""
    return _names("xq_fit_names")


def param_names() -> tuple[str, ...]:
    """What Side.param may be, in the order of enum xq_param."""
    return _names("xq_param_names")


def shortest(x: float) -> float:
    """The shortest decimal that is the same number in single precision: 0.045 instead of 0.04500000178813934."""
    return float(str(np.float32(x)))


def side_from_c(c: Any, number: Callable[[int], int] = int) -> Side:
    """A Side from an xq_side; number: what to call the layers that it reads."""
    owner, source = (-1 if layer < 0 else number(layer) for layer in (c.owner, c.source))
    fit, param = fit_names()[c.fit], param_names()[c.param]
    return Side(c.bits, c.group, fit, param, bool(c.rotate), owner, shortest(c.eta), source)


def side_to_c(c: Any, side: Side, where: str) -> None:
    """Fills an xq_side."""
    for name, names in (("fit", fit_names()), ("param", param_names())):
        value = getattr(side, name)
        if value not in names:
            raise ValueError(f"{where}: {name} is {value!r}, must be one of {', '.join(names)}")
        setattr(c, name, names.index(value))
    c.bits, c.group = side.bits, side.group
    c.rotate, c.owner, c.eta, c.source = int(side.rotate), side.owner, side.eta, side.source


def _c_layer(layer: Layer, where: str) -> Any:
    ffi, _ = native.load()
    c = ffi.new("xq_layer *")
    side_to_c(c.k, layer.k, f"{where}, K")
    side_to_c(c.v, layer.v, f"{where}, V")
    return c


def renumbered(layer: Layer, numbers: Sequence[int]) -> Layer:
    """A layer that names those it reads as numbers[i] instead of i."""

    def name(i: int) -> int:
        return i if i < 0 else numbers[i]

    return Layer(*(replace(s, owner=name(s.owner), source=name(s.source)) for s in (layer.k, layer.v)))


def _checked(n: int) -> int:
    if n < 0:
        raise ValueError(native.error())
    return n


def block_bytes(layer: Layer, shape: Shape) -> int:
    """Bytes of one sealed page of one KV head."""
    ffi, lib = native.load()
    layout = ffi.new("xq_block_layout *")
    if lib.xq_block_layout_of(_c_layer(layer, "layer"), shape.d, shape.e, layout) != 0:
        raise ValueError(native.error())
    return int(layout.bytes)


@dataclass(frozen=True)
class Plan:
    """What a whole cache stores: one Layer for each layer that has keys and values, in order.

    window: newest tokens that stay open; negative: nothing is ever sealed. pinned: first pages of a sequence that
    stay open. open_bits: 8 or 16, of open pages that are not being written. preset: the preset that the plan started
    from.  maps: one for each layer whose values have a source. expected_kld: KL divergence from F16 that calibration
    measured.  transforms: of layers whose keys are stored in coordinates of their own, the matrices that keys are
    multiplied by, queries by their inverses: F16 numbers, little-endian, [KV head][d][d].
    """

    preset: str
    layers: tuple[Layer, ...]
    window: int
    pinned: int
    maps: Mapping[int, ValueMap] = field(default_factory=dict)
    expected_kld: float | None = None
    open_bits: int = 8
    transforms: Mapping[int, bytes] = field(default_factory=dict)

    @classmethod
    def from_preset(cls, name: str, n_layers: int) -> Plan:
        """The named preset for n_layers layers; ValueError names the presets there are."""
        ffi, lib = native.load()
        c = ffi.new("xq_plan *")
        if lib.xq_plan_preset(name.encode(), n_layers, c) != 0:
            raise ValueError(native.error())
        layers = tuple(Layer(*(side_from_c(side) for side in (c.layers[i].k, c.layers[i].v))) for i in range(n_layers))
        return cls(name, layers, c.window, c.pinned, open_bits=c.open_bits)

    def _c_plan(self) -> Any:
        c = native.load()[0].new("xq_plan *")
        c.n_layers, c.window, c.pinned, c.open_bits = len(self.layers), self.window, self.pinned, self.open_bits
        for i, layer in enumerate(self.layers):
            c.layers[i] = _c_layer(layer, f"layer {i}")[0]
        return c

    def check(self, shapes: Sequence[Shape] | None = None) -> None:
        """ValueError if a field is out of range or does not fit the shapes: names layer, field and what is allowed."""
        ffi, lib = native.load()
        c = self._c_plan()
        d = ffi.new("int32_t[]", [s.d for s in shapes]) if shapes else ffi.NULL
        e = ffi.new("int32_t[]", [s.e for s in shapes]) if shapes else ffi.NULL
        if lib.xq_plan_check(c, d, e) != 0:
            raise ValueError(native.error())

    def true_bits(self, shapes: Sequence[Shape]) -> float:
        """Bits per value of a sealed page, everything in it counted: codes, scales, zeros and padding.

        16 if there are no layers: then all that is cached is F16.
        """
        if not self.layers:
            return 16.0
        pairs = list(zip(self.layers, shapes, strict=True))
        stored = sum(8 * block_bytes(layer, s) * s.heads for layer, s in pairs)
        return stored / sum(PAGE * (s.d + s.e) * s.heads for _, s in pairs)

    def equivalent_bits(self, shapes: Sequence[Shape] | None = None) -> float:
        """Bits of codes per value, averaged over K, V and layers; borrowed codes count 0 (arXiv 2510.11236).

        16 if there are no layers.  shapes: of them, so that V of latent layers is left out; None: there are none.
        """
        if not self.layers:
            return 16.0
        widths = [s.e for s in shapes] if shapes else [1] * len(self.layers)
        pairs = list(zip(self.layers, widths, strict=True))
        sides = [layer.k for layer in self.layers] + [layer.v for layer, e in pairs if e > 0]
        return sum(side.bits for side in sides if side.owner < 0) / len(sides)

    def slots(self, n_ctx: int, n_seq: int = 1) -> int:
        """Pages that have room in F16: the one that is written; with open_bits 16 pinned ones and the window as well.

        At most all of n_ctx.  n_seq: sequences that have tokens in the cache; those beyond the first add a sixth of all
        at most.
        """
        return _checked(native.load()[1].xq_plan_slots(self._c_plan(), -(-n_ctx // PAGE), n_seq))

    def byte_slots(self, n_ctx: int, n_seq: int = 1) -> int:
        """Pages that have room in bytes: with open_bits 8 pinned ones and the window, unless all of n_ctx is F16."""
        return _checked(native.load()[1].xq_plan_byte_slots(self._c_plan(), -(-n_ctx // PAGE), n_seq))

    def cache_bytes(self, shapes: Sequence[Shape], n_ctx: int, n_seq: int = 1) -> int:
        """Bytes that a cache of n_ctx cells allocates: blocks, open pages, matrices (page tables, a few KiB, apart)."""
        ffi, lib = native.load()
        d, e, heads = (ffi.new("int32_t[]", [getattr(s, x) for s in shapes]) for x in ("d", "e", "heads"))
        slots, in_bytes = self.slots(n_ctx, n_seq), self.byte_slots(n_ctx, n_seq)
        pages = _checked(lib.xq_cache_bytes(self._c_plan(), d, e, heads, -(-n_ctx // PAGE), slots, in_bytes))
        return pages + 2 * sum(map(len, self.transforms.values()))  # for keys, and their inverses for queries

    def to_dict(self) -> dict[str, Any]:
        """Everything, as a dictionary that Plan.load reads back."""
        layers = {str(i): asdict(layer) for i, layer in enumerate(self.layers)}
        out = {name: getattr(self, name) for name in ("preset", *_NUMBERS)} | {"layers": layers}
        if self.expected_kld is not None:
            out["expected_kld"] = self.expected_kld
        if self.maps:
            maps = {i: {"heads": list(m.heads), "weight": b64encode(m.weight).decode()} for i, m in self.maps.items()}
            out["maps"] = {str(i): value for i, value in maps.items()}
        if self.transforms:
            out["transforms"] = {str(i): b64encode(weight).decode() for i, weight in self.transforms.items()}
        return out

    @classmethod
    def load(cls, source: PlanSource, n_layers: int, preset: str = "xquant") -> Plan:
        """A plan from a Plan, a dictionary or a JSON file; preset: where it starts from if it names none.

        {"preset": "xquant", "window": 128, "pinned": 1, "open_bits": 8, "layers": {"0-3": {"k": {"bits": 4}}, "18":
        {...}}}: all keys may be left out, and are then the preset's; layers are those of the cache, counted from 0.
        "maps": {"1": {"heads": [...], "weight": base64 of F16 numbers}} for layers whose values have a source,
        "transforms": {"1": base64 of F16 numbers} for layers whose keys are stored in other coordinates.
        ValueError names an unknown key or a bad value.
        """
        if isinstance(source, Plan):
            if len(source.layers) != n_layers:
                raise ValueError(f"kv_plan has {len(source.layers)} layers, the model's cache has {n_layers}")
            return source
        source, where = _read(source)
        _known(source, {"preset", *_NUMBERS, "layers", "maps", "transforms", "expected_kld"}, where)
        name = str(source.get("preset", preset))
        plan = replace(cls.from_preset("xquant" if name in MADE else name, n_layers), preset=name)
        layers = list(plan.layers)
        for key, change in _mapping(source.get("layers", {}), f"{where}: layers").items():
            for i in _layer_range(str(key), n_layers, where):
                layers[i] = _changed(layers[i], _mapping(change, f"{where}: layer {key}"), f"{where}: layer {key}")
        numbers = {k: _integer(source.get(k, getattr(plan, k)), f"{where}: {k}") for k in _NUMBERS}
        maps = dict(_maps(source.get("maps", {}), n_layers, where))
        transforms = dict(_transforms(source.get("transforms", {}), n_layers, where))
        kld = source.get("expected_kld")
        if kld is not None and not (isinstance(kld, float) and 0 <= kld < float("inf")):
            raise ValueError(f"{where}: expected_kld is {kld!r}, must be a number of at least 0")
        plan = cls(
            name, tuple(layers), numbers["window"], numbers["pinned"], maps, kld, numbers["open_bits"], transforms
        )
        plan.check()
        for i, layer in enumerate(layers):
            if layer.v.source >= 0 and i not in maps:
                raise ValueError(f"{where}: layer {i} is mapped from layer {layer.v.source}, but maps has no {i}")
        return plan


PlanSource = str | Path | Mapping[str, Any] | Plan
"""What Llama's kv_plan takes."""


def named_preset(source: PlanSource) -> str | None:
    """The preset that a plan, in any form that Plan.load takes, says it starts from; None if it names none."""
    if isinstance(source, Plan):
        return source.preset
    preset = _read(source)[0].get("preset")
    return None if preset is None else str(preset)


def _read(source: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """A plan's dictionary and what to call it in messages."""
    if isinstance(source, Mapping):
        return source, "kv_plan"
    try:
        value = json.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"kv_plan {source}: {error}") from error
    if not isinstance(value, Mapping):
        raise ValueError(f"{source}: must be an object, not {type(value).__name__}")
    return value, str(source)


def _maps(value: Any, n_layers: int, where: str) -> Iterator[tuple[int, ValueMap]]:
    for key, entry in _mapping(value, f"{where}: maps").items():
        (i,) = _layer_range(str(key), n_layers, where)
        entry = _mapping(entry, f"{where}: map {key}")
        _known(entry, {"heads", "weight"}, f"{where}: map {key}")
        heads, weight = entry.get("heads"), entry.get("weight")
        if not isinstance(heads, list) or not isinstance(weight, str):
            raise ValueError(f"{where}: map {key} must have heads, a list, and weight, a string")
        raw = _halves(weight, f"{where}: map {key}: weight")
        yield i, ValueMap(tuple(_integer(h, f"{where}: map {key}: head") for h in heads), raw)


def _transforms(value: Any, n_layers: int, where: str) -> Iterator[tuple[int, bytes]]:
    for key, weight in _mapping(value, f"{where}: transforms").items():
        (i,) = _layer_range(str(key), n_layers, where)
        if not isinstance(weight, str):
            raise ValueError(f"{where}: transform {key} is {weight!r}, must be a string")
        yield i, _halves(weight, f"{where}: transform {key}")


def _halves(text: str, where: str) -> bytes:
    """F16 numbers that stand in a text as base64."""
    try:
        raw = b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"{where} is not base64: {error}") from error
    if len(raw) % 2 or not np.isfinite(np.frombuffer(raw, "<f2")).all():
        raise ValueError(f"{where} must be finite F16 numbers")
    return raw


def _integer(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**31) <= value < 2**31:
        raise ValueError(f"{where} is {value!r}, must be an integer")
    return value


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be an object, not {value!r}")
    return value


def _known(value: Mapping[str, Any], allowed: set[str], where: str) -> None:
    for key in value:
        if key not in allowed:
            raise ValueError(f"{where}: unknown key {key!r}; there are {', '.join(sorted(allowed))}")


def _layer_range(text: str, n_layers: int, where: str) -> Iterator[int]:
    first, _, last = text.partition("-")
    if not first.isdecimal() or (last and not last.isdecimal()) or text.endswith("-"):
        raise ValueError(f"{where}: layers {text!r} must be a number or a range such as '0-3'")
    low, high = int(first), int(last or first)
    if n_layers == 0:
        raise ValueError(f"{where}: layers {text!r} cannot be: the model's cache has no layers to quantize")
    if low > high or high >= n_layers:
        raise ValueError(f"{where}: layers {text!r} must lie within 0 to {n_layers - 1}")
    return iter(range(low, high + 1))


def _changed(layer: Layer, change: Mapping[str, Any], where: str) -> Layer:
    _known(change, {"k", "v"}, where)
    return Layer(*(_changed_side(getattr(layer, name), change.get(name, {}), f"{where}, {name}") for name in "kv"))


def _changed_side(side: Side, change: Any, where: str) -> Side:
    change = _mapping(change, where)
    _known(change, {field.name for field in fields(Side)}, where)
    for name, value in change.items():
        kind = type(getattr(side, name))
        fits = isinstance(value, (int, float)) if kind is float else type(value) is kind
        if not fits or isinstance(value, bool) != (kind is bool):
            raise ValueError(f"{where}: {name} is {value!r}, must be {kind.__name__}")
        if kind is int:
            _integer(value, f"{where}: {name}")
    return replace(side, **change)
