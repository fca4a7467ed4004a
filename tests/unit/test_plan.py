"""Plans: presets, names, bits, sizes, dictionaries."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from xquant_gguf import Plan, Side, native
from xquant_gguf.plan import Shape, block_bytes, fit_names, param_names, preset_names, shortest

LLAMA_8B = [Shape(128, 128, 8)] * 32

MAP = {"heads": [0], "weight": "ADw="}


@pytest.mark.parametrize(
    ("name", "true", "equivalent"),
    [
        ("xquant", 3.25 - 1 / 16, 3.0),  # values of 128 channels share 16 bits
        ("xquant-small", 2.75 - 1 / 16, 2.5),
        ("xquant-tiny", 1.75 - 1 / 16, 1.5),
        ("xquant-paper", 2.375, 1.375),
        ("xquant-paper-128", 1.625, 1.375),
    ],
)
def test_bits_of_the_presets(name: str, true: float, equivalent: float) -> None:
    plan = Plan.from_preset(name, 32)
    assert plan.true_bits(LLAMA_8B) == pytest.approx(true)
    assert plan.equivalent_bits() == equivalent


def test_the_papers_schedule() -> None:
    """32 layers: k_q 30, v_q 2, k_m 32, v_m 16 (arXiv 2510.11236)."""
    layers = Plan.from_preset("xquant-paper", 32).layers
    assert [layer.k.bits for layer in layers] == [2] * 30 + [1] * 2
    assert [layer.v.bits for layer in layers] == [2] * 2 + [1] * 30
    assert [i for i, layer in enumerate(layers) if layer.v.owner >= 0] == list(range(17, 32, 2))
    assert all(layer.v.owner == i - 1 for i, layer in enumerate(layers) if layer.v.owner >= 0)
    assert {layer.v.eta for layer in layers} == {shortest(1 / 6), 0.045}


def test_cache_bytes_at_32k() -> None:
    """Qwen2.5-Coder-0.5B: less than a quarter of F16, windows counted."""
    shapes = [Shape(64, 64, 2)] * 24
    plan = Plan.from_preset("xquant", 24)
    assert (plan.open_bits, plan.slots(32768), plan.byte_slots(32768)) == (8, 1, 2)
    f16 = 2 * 32768 * 24 * 2 * 128
    assert f16 / plan.cache_bytes(shapes, 32768) > 4.7
    wide = replace(plan, open_bits=16)
    assert (wide.slots(32768), wide.byte_slots(32768)) == (3, 0)
    assert f16 / wide.cache_bytes(shapes, 32768) > 4.6


@pytest.mark.parametrize(("n_ctx", "less"), [(1024, 2.25), (2048, 3.1), (4096, 3.8), (8192, 4.3), (32768, 4.7)])
def test_short_contexts_are_small_too(n_ctx: int, less: float) -> None:
    """How much less than F16 the default preset takes."""
    shape = Shape(64, 64, 3)
    f16 = 2 * n_ctx * 30 * 3 * 128
    assert f16 / Plan.from_preset("xquant", 30).cache_bytes([shape] * 30, n_ctx) > less


def test_a_latent_layer_stores_keys_alone() -> None:
    """GLM-4.7-Flash's shape: one row of 576 channels a token, whose first 512 are the values."""
    shapes = [Shape(576, 0, 1)] * 3
    for name, bits in (("xquant", 4), ("xquant-small", 3), ("xquant-tiny", 2)):
        plan = Plan.from_preset(name, 3)
        plan.check(shapes)
        assert plan.true_bits(shapes) == bits + 0.25
        assert plan.equivalent_bits(shapes) == bits
        n_block = 576 * 128 * bits // 8 + 2 * 576 * 2
        assert block_bytes(plan.layers[0], shapes[0]) == n_block
        n_bytes = 128 * 576 + 2 * 576 * 2
        # the first page has no block
        assert plan.cache_bytes(shapes, 128 * 100) == 3 * (99 * n_block + 128 * 576 * 2 + 2 * n_bytes)
        wide = replace(plan, open_bits=16)
        assert wide.cache_bytes(shapes, 128 * 100) == 3 * (100 * n_block + 3 * 128 * 576 * 2)
    owner = replace(plan, layers=(plan.layers[0], replace(plan.layers[1], v=Side(1, 0, "lsq", rotate=True, owner=0))))
    owner.check(shapes[:2])  # nothing is stored of V: what its plan says is not looked at
    with pytest.raises(ValueError, match="layer 1, V: owner 0 must be a layer of the cache with the same head width"):
        owner.check([shapes[0], Shape(64, 64, 1)])


def test_names_are_those_of_the_enumerations() -> None:
    """In their order: what the numbers of a file or of C mean."""
    _, lib = native.load()
    for prefix, names in (("XQ_FIT", fit_names()), ("XQ_PARAM", param_names())):
        assert [getattr(lib, f"{prefix}_{name.upper()}") for name in names] == list(range(len(names)))
    assert len(fit_names()) == 5


def test_slots_of_many_sequences_leave_most_pages_to_codes() -> None:
    """Each wants its window and its pinned pages; those beyond the first get a sixth of all pages at most."""
    plan = replace(Plan.from_preset("xquant", 2), window=200, pinned=2, open_bits=16)
    assert plan.slots(128 * 1000) == 2 + 2 + 1
    assert plan.slots(128 * 1000, n_seq=3) == 3 * (2 + 2 + 1)
    assert plan.slots(128 * 80, n_seq=8) == 2 + 2 + 1 + 80 // 6
    assert plan.slots(128 * 3 + 1) == 4  # all there are
    assert replace(plan, window=-1).slots(128 * 1000) == 1000
    shapes = [Shape(64, 96, 2), Shape(128, 128, 1)]
    blocks = sum(block_bytes(layer, s) * s.heads for layer, s in zip(plan.layers, shapes, strict=True))
    rows = 2 * 128 * (2 * (64 + 96) + 256)
    assert plan.cache_bytes(shapes, 128 * 1000) == 1000 * blocks + 5 * rows
    assert plan.cache_bytes(shapes, 128 * 5) == 5 * rows  # every page has a slot: there are no blocks
    for count in (plan.slots, plan.byte_slots):
        with pytest.raises(ValueError, match="0 pages, 1 sequences: must be above 0"):
            count(0)


def test_slots_of_many_sequences_with_open_pages_in_bytes() -> None:
    """Each has one page in rows, and window and pinned pages in bytes: a sixth of all pages at most of each kind."""
    plan = replace(Plan.from_preset("xquant", 2), window=200, pinned=2)

    def slots(n_pages: int, n_seq: int = 1) -> tuple[int, int]:
        return plan.slots(128 * n_pages, n_seq), plan.byte_slots(128 * n_pages, n_seq)

    assert slots(1000) == (1, 4)
    assert slots(1000, 3) == (3, 12)
    assert slots(80, 8) == (8, 4 + 80 // 6)
    assert slots(80, 64) == (1 + 80 // 6, 4 + 80 // 6)
    assert slots(6) == (1, 4)
    assert slots(5) == slots(5, 4) == (5, 0)  # all are rows
    for n_pages in range(1, 40):  # what has grown for some sequences only grows for more
        sizes = [slots(n_pages, n) for n in range(1, 20)]
        assert all(
            a <= b for i in (0, 1) for a, b in zip([s[i] for s in sizes], [s[i] for s in sizes[1:]], strict=False)
        )


def test_dictionary_round_trip(tmp_path: Path) -> None:
    plan = Plan.from_preset("xquant-paper", 6)
    changed = replace(plan.layers[2], k=Side(3, 64, "minmax", "f16", False, -1, 0.02))
    plan = replace(plan, layers=(*plan.layers[:2], changed, *plan.layers[3:]), window=64)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_dict()))
    assert Plan.load(path, 6) == plan


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"preset": "none"}, 'preset "none" is unknown; there are xquant'),
        (
            {"layer": {}},
            "unknown key 'layer'; there are expected_kld, layers, maps, open_bits, pinned, preset, transforms, window",
        ),
        ({"window": "big"}, "window is 'big', must be an integer"),
        ({"window": -2}, "window is -2, must be -1"),
        ({"pinned": 5000}, "pinned is 5000, must be 0 to 1024"),
        ({"open_bits": 4}, "open_bits is 4, must be 8 or 16"),
        ({"layers": {"3-1": {}}}, "layers '3-1' must lie within 0 to 3"),
        ({"layers": {"x": {}}}, "must be a number or a range"),
        ({"layers": {"1": {"q": {}}}}, "unknown key 'q'"),
        ({"layers": {"1": {"k": {"bits": 2.5}}}}, "bits is 2.5, must be int"),
        ({"layers": {"1": {"k": {"bits": 5}}}}, "layer 1, K: bits is 5, must be 0 to 4"),
        ({"layers": {"1": {"k": {"group": 16}}}}, "group is 16, must be 32, 64 or 128 tokens"),
        ({"layers": {"1": {"k": {"fit": "best"}}}}, "fit is 'best', must be one of paper"),
        ({"layers": {"1": {"v": {"eta": 0.5}}}}, "eta is 0.5, must be in"),
        ({"layers": {"1": {"v": {"owner": 3}}}}, "borrowed codes need fit paper"),
        (
            {"layers": {"0-3": {"v": {"fit": "paper", "param": "f16"}}, "1": {"v": {"owner": 2}}}},
            "owner is 2, must be an ea",
        ),
        ({"layers": {"0-3": {"v": {"fit": "lsq"}}}}, "fit lsq is for borrowed codes"),
        ({"layers": {"1": {"v": {"source": 1}}}, "maps": {"1": MAP}}, "map is 1, must be an earlier layer"),
        ({"layers": {"1": {"k": {"source": 0}}}}, "map is 0, must be -1: keys are not mapped"),
        ({"layers": {"1-2": {"v": {"source": 0}}, "3": {"v": {"source": 2}}}}, "its map reads layer 2, which must be"),
        ({"layers": {"1": {"v": {"source": 0}}}}, "layer 1 is mapped from layer 0, but maps has no 1"),
        ({"maps": {"1": {"heads": [0], "weight": "?"}}}, "weight is not base64"),
        ({"maps": {"1": {"heads": [0], "weight": "AHw="}}}, "weight must be finite F16 numbers"),
        ({"expected_kld": "low"}, "expected_kld is 'low', must be a number of at least 0"),
        ({"maps": {"1": {"heads": [0]}}}, "must have heads, a list, and weight, a string"),
        ({"transforms": {"1": [0]}}, "transform 1 is \\[0\\], must be a string"),
        ({"transforms": {"0": "?"}}, "transform 0 is not base64"),
        ({"transforms": {"0": "AHw="}}, "transform 0 must be finite F16 numbers"),
        ({"transforms": {"7": "AAA="}}, "layers '7' must lie within 0 to"),
        ([1], "must be an object"),
    ],
)
def test_bad_plans_are_named(source: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(source))
    with pytest.raises(ValueError, match=message):
        Plan.load(path, 4)


def test_widths_that_no_group_fits() -> None:
    plan = Plan.from_preset("xquant-paper", 2)
    with pytest.raises(ValueError, match="layer 0, V: group 32 does not divide the head width 80; use 0"):
        plan.check([Shape(80, 80, 1)] * 2)
    with pytest.raises(ValueError, match="head width is 72, must be a multiple of 16"):
        plan.check([Shape(72, 64, 1)] * 2)
    assert block_bytes(Plan.from_preset("xquant", 1).layers[0], Shape(80, 80, 1)) % 64 == 0


def test_preset_names() -> None:
    assert preset_names() == ("xquant", "xquant-small", "xquant-tiny", "xquant-paper", "xquant-paper-128")
