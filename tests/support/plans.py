"""Plans of a model with one sliding layer, as GGUF keys: random valid ones, and bad ones with what is said of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from gguf import GGUFValueType
from hypothesis import strategies as st

from support import tiny_gguf
from xquant_gguf.metadata import Key, Provenance, plan_block, plan_keys
from xquant_gguf.plan import Layer, Plan, Side, ValueMap, shortest

SHAPE = tiny_gguf.Shape(arch="mimo2", n_layer=5)  # the last layer is a sliding one
HELD = (0, 1, 2, 3)
N_HELD, D, E, HEADS = len(HELD), SHAPE.key_length, SHAPE.value_length, SHAPE.n_head_kv
I32 = GGUFValueType.INT32

etas = st.integers(0, 499).map(lambda n: n / 1000)
own_keys = st.builds(
    Side, st.integers(0, 4), st.sampled_from((32, 64, 128)), st.sampled_from(("paper", "minmax", "clip", "lloyd")),
    st.sampled_from(("f16", "log8")), st.booleans(), eta=etas,
)  # fmt: skip
own_values = st.builds(
    Side, st.integers(0, 4), st.sampled_from((0, 32, 64)), st.sampled_from(("paper", "minmax", "clip", "lloyd")),
    st.sampled_from(("f16", "log8")), st.booleans(), eta=etas,
)  # fmt: skip


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Valid plans of N_HELD layers: own codes, borrowed codes, maps."""
    layers: list[Layer] = []
    maps: dict[int, ValueMap] = {}
    for i in range(N_HELD):
        k, v = draw(own_keys), draw(own_values)
        owners = [j for j, layer in enumerate(layers) if layer.k.owner < 0 and layer.k.bits > 0]
        if len(owners) > 0 and draw(st.booleans()):
            owner = draw(st.sampled_from(owners))
            k = replace(layers[owner].k, group=k.group, fit="lsq", param="f16", owner=owner, eta=k.eta)
        sources = [j for j, layer in enumerate(layers) if layer.v.owner < 0 and layer.v.source < 0]
        if len(sources) > 0 and draw(st.booleans()):
            v = replace(v, source=draw(st.sampled_from(sources)))
            rng = np.random.default_rng(draw(st.integers(0, 9)))
            weight = rng.standard_normal((HEADS, E, E)).astype("<f2").tobytes()
            maps[i] = ValueMap(tuple(int(h) for h in rng.integers(0, HEADS, HEADS)), weight)
        layers.append(Layer(k, v))
    transforms: dict[int, bytes] = {}
    lent = {layer.k.owner for layer in layers}
    for i in set(range(N_HELD)) - lent:
        if layers[i].k.owner < 0 and draw(st.booleans()):
            layers[i] = replace(layers[i], k=replace(layers[i].k, rotate=False))
            transforms[i] = matrices(draw(st.integers(0, 9)))
    window, pinned = draw(st.integers(-1, 4096)), draw(st.integers(0, 64))
    kld = draw(st.none() | st.floats(0, 9, width=32).map(shortest))
    open_bits = draw(st.sampled_from((8, 16)))
    return Plan("calibrated", tuple(layers), window, pinned, maps, kld, open_bits, transforms)


def matrices(seed: int) -> bytes:
    """What keys of a layer may be multiplied by."""
    return np.random.default_rng(seed).standard_normal((HEADS, D, D)).astype("<f2").tobytes()


def keys_of(plan: Plan, n_layers: int = SHAPE.n_layer, made_by: Provenance | None = None) -> dict[str, Key]:
    """The keys of a plan for the layers that the cache holds."""
    return dict(plan_keys(plan, HELD, n_layers, made_by))


def changed(keys: dict[str, Key], name: str, key: Key | None) -> dict[str, Key]:
    """The keys with another value of xquant.name; None: without it."""
    out = {k: v for k, v in keys.items() if k != "xquant." + name}
    return out if key is None else {**out, "xquant." + name: key}


@st.composite
def damaged_plans(draw: st.DrawFn) -> bytes:
    """A file of which one to four bytes near its beginning are others, and which may be cut off."""
    out = bytearray(plan_block(keys_of(MAPPED))[:6000])
    for _ in range(draw(st.integers(1, 4))):
        out[draw(st.integers(0, min(len(out), 1600) - 1))] = draw(st.integers(0, 255))
    return bytes(out[: draw(st.sampled_from((len(out), 1000, 300)))])


MAPPED = replace(
    Plan.from_preset("xquant", N_HELD),
    layers=tuple(
        replace(layer, v=replace(layer.v, source=0 if i == 1 else -1))
        for i, layer in enumerate(Plan.from_preset("xquant", N_HELD).layers)
    ),
    expected_kld=0.5,
    maps={1: ValueMap((0,) * HEADS, bytes(2 * HEADS * E * E))},
)


def array(values: list[Any], kind: GGUFValueType = I32) -> Key:
    return Key(GGUFValueType.ARRAY, values, kind)


BAD = [
    ("version", Key(GGUFValueType.UINT32, 2), "xquant.version is 2, must be 1"),
    ("version", Key(I32, 1), "xquant.version is "),
    ("window", None, "xquant.window is missing"),
    ("window", Key(I32, -7), "window is -7, must be -1"),
    ("open_bits", Key(I32, 4), "open_bits is 4, must be 8 or 16"),
    ("open_bits", Key(GGUFValueType.UINT32, 8), "xquant.open_bits is "),
    ("k.bits", array([4] * 4), "must be "),
    ("k.bits", array([4, 4, 9, 4, 0]), "bits is 9, must be 0 to 4"),
    ("v.bits", array([4] * 5, GGUFValueType.INT64), "xquant.v.bits is an array of "),
    ("v.group", Key(I32, 5), "xquant.v.group is "),
    ("v.eta", array([0.0, float("nan"), 0.0, 0.0, 0.0], GGUFValueType.FLOAT32), "eta is nan, must be in"),
    ("v.eta", array([0.5] * 5, GGUFValueType.FLOAT32), "eta is 0.5, must be in"),
    ("k.owner", array([-1, -1, 2, -1, -1]), "2, must be an earlier layer"),
    ("v.source", array([-1, 0, 1, -1, -1]), "map"),
    ("v.source", array([-1, -5, -1, -1, -1]), "must be an earlier layer"),
    ("k.fit", array(["best"] * 5, GGUFValueType.STRING), "best"),
    ("calibration.expected_kld", Key(GGUFValueType.FLOAT32, -1.0), "expected_kld is -1"),
    ("calibration.expected_kld", Key(I32, 1), "xquant.calibration.expected_kld is "),
    ("map.1.weight", None, "xquant.map.1.weight is missing"),
    ("map.1.weight", array([0x7C00] * (HEADS * E * E), GGUFValueType.UINT16), "not finite"),
    ("transform.2.weight", array([0x7C00] * (HEADS * D * D), GGUFValueType.UINT16), "not finite"),
    ("transform.2.weight", array([0] * 7), "xquant.transform.2.weight is an array of "),
    ("transform.2.weight", Key(I32, 0), "xquant.transform.2.weight is "),
]
