"""Plans in GGUF files, as the fork reads them (Python's half: tests/unit/test_plan_keys.py); copies of models."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import given, settings

from support import tiny_gguf
from support.lying_gguf import LIES
from support.plans import BAD, HEADS, MAPPED, SHAPE, D, array, changed, damaged_plans, keys_of, matrices, plans
from xquant_gguf import Llama, fork
from xquant_gguf.gguf_file import GGUFFile
from xquant_gguf.metadata import Key, Provenance, copy_with_keys, plan_block, read_plan
from xquant_gguf.plan import Plan
from xquant_gguf.session import Model, override_array

I32 = GGUFValueType.INT32
PLAIN = Plan.from_preset("xquant", len(MAPPED.layers)).layers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("metadata") / "model.gguf"
    return Path(tiny_gguf.write(path, SHAPE, tiny_gguf.random_weights(SHAPE)))


def fork_reads(model: Path, block: bytes) -> Plan:
    provided = fork.plan_provider(lambda shapes: block)
    with Model(model, weights=False) as dry, provided, dry.session("xquant", n_ctx=1024) as session:
        found = fork.plan(session.ctx, "calibrated")
    assert found is not None
    return found[0]


@settings(max_examples=40, deadline=None)
@given(plan=plans())
def test_the_fork_reads_what_python_writes(model: Path, plan: Plan) -> None:
    found = fork_reads(model, plan_block(keys_of(plan)))
    assert replace(found, maps=plan.maps, transforms=plan.transforms, expected_kld=plan.expected_kld) == plan


def test_files_from_before_open_bits_keep_open_pages_in_f16(model: Path, tmp_path: Path) -> None:
    keys = keys_of(MAPPED)
    assert [
        fork_reads(model, plan_block(changed(keys, "open_bits", key))).open_bits for key in (None, Key(I32, 8))
    ] == [
        16,
        8,
    ]
    old = tmp_path / "old.gguf"
    copy_with_keys(
        model, old, changed(keys_of(replace(MAPPED, layers=PLAIN, maps={}, expected_kld=None)), "open_bits", None)
    )
    llm = Llama(str(old), n_ctx=2048, kv_type="xquant", verbose=False)
    llm.eval([5] * 700)
    info = llm.kv_cache_info()
    assert (info["pages_sealed"], info["pages_open"], info["pages_bytes"]) == (3, 3, 0)
    llm.close()


def test_keys_are_rotated_where_they_may_be(model: Path, tmp_path: Path) -> None:
    """Not in files from before they could be; also where they have a bias, which is known."""
    keys = keys_of(MAPPED)
    for these, rotated in ((keys, True), (changed(keys, "k.rotate", None), False)):
        found = fork_reads(model, plan_block(these))
        assert [layer.k.rotate for layer in found.layers] == [rotated] * 4
    shape = tiny_gguf.Shape(arch="qwen2", n_layer=2, n_embd=SHAPE.n_head * SHAPE.key_length)
    biased = tiny_gguf.write(tmp_path / "biased.gguf", shape, tiny_gguf.random_weights(shape))
    with Model(biased, weights=False) as dry, dry.session("xquant", n_ctx=1024) as session:
        plan = fork.plan(session.ctx, "xquant")
    assert plan is not None
    assert [layer.k.rotate for layer in plan[0].layers] == [True] * 2


@pytest.mark.parametrize(("name", "key", "message"), BAD)
def test_bad_keys_are_named(model: Path, name: str, key: Key | None, message: str) -> None:
    """As Python names them."""
    with pytest.raises(ValueError, match=message):
        fork_reads(model, plan_block(changed(keys_of(MAPPED), name, key)))


@pytest.mark.parametrize(
    ("name", "key", "message"),
    [
        ("map.1.weight", array([0] * 7, GGUFValueType.UINT16), "and 7 entries long, must be"),
        ("map.1.heads", array([0] * (HEADS + 1)), "entries long, must be"),
        ("map.1.heads", array([HEADS] * HEADS), f"has {HEADS}, must be 0 to {HEADS - 1}"),
        ("map.1.heads", array([-1] * HEADS), f"has -1, must be 0 to {HEADS - 1}"),
    ],
)
def test_maps_that_do_not_fit_the_model(model: Path, name: str, key: Key, message: str) -> None:
    keys = {**keys_of(MAPPED), "xquant." + name: key}
    with pytest.raises(ValueError, match=message):
        fork_reads(model, plan_block(keys))


PLAIN_KEYS = [False] * SHAPE.n_layer
FITTING = [0x3C00] * (HEADS * D * D)


@pytest.mark.parametrize(
    ("layer", "numbers", "rotate", "message"),
    [
        (2, [0x3C00] * 7, PLAIN_KEYS, f"7 entries long, must be {HEADS * D * D}"),
        (2, FITTING, [True] * SHAPE.n_layer, r"xquant.k.rotate\[2\] is true, must be false"),
        (4, FITTING, PLAIN_KEYS, "layer 4 must have keys of its own in the cache"),
    ],
)
def test_transforms_that_do_not_fit_the_model(
    model: Path, layer: int, numbers: list[int], rotate: list[bool], message: str
) -> None:
    keys = {
        **changed(keys_of(MAPPED), "k.rotate", array(rotate, GGUFValueType.BOOL)),
        f"xquant.transform.{layer}.weight": array(numbers, GGUFValueType.UINT16),
    }
    with pytest.raises(ValueError, match=message):
        fork_reads(model, plan_block(keys))


@pytest.mark.parametrize("lends", [True, False])
def test_transforms_of_keys_whose_codes_are_shared(model: Path, lends: bool) -> None:
    sides = [layer.k for layer in MAPPED.layers]
    sides = [replace(k, rotate=False) for k in sides]
    sides[2] = replace(sides[2], fit="lsq", owner=1)
    layers = tuple(replace(layer, k=k) for layer, k in zip(MAPPED.layers, sides, strict=True))
    plan = replace(MAPPED, layers=layers, transforms={1 if lends else 2: matrices(0)})
    with pytest.raises(ValueError, match=f"layer {1 if lends else 2} must neither borrow codes of keys nor lend them"):
        fork_reads(model, plan_block(keys_of(plan)))


def test_transforms_without_an_inverse(model: Path) -> None:
    layers = [replace(layer, k=replace(layer.k, rotate=False)) for layer in PLAIN]
    plan = replace(Plan.from_preset("xquant", len(PLAIN)), layers=tuple(layers))
    for weight in (bytes(2 * HEADS * D * D), np.full(HEADS * D * D, 1e-6, "<f2").tobytes()):
        with pytest.raises(ValueError, match=r"xquant.transform.1.weight must be matrices with an inverse"):
            Llama(str(model), n_ctx=512, kv_plan=replace(plan, transforms={1: weight}), verbose=False)


def test_layers_that_do_not_fit_the_model(model: Path) -> None:
    with pytest.raises(ValueError, match="7 entries long, must be 5"):
        fork_reads(model, plan_block(keys_of(MAPPED, 7)))


def test_a_name_of_any_length_is_told_in_64_bytes(model: Path) -> None:
    names = array(["b" * 1000] * SHAPE.n_layer, GGUFValueType.STRING)
    keys = {**keys_of(MAPPED), "xquant.k.fit": names}
    told = f'xquant.k.fit\\[0\\] is "{"b" * 64}", must be one of'
    with pytest.raises(ValueError, match=told):
        fork_reads(model, plan_block(keys))


def test_an_override_that_fills_its_field_ends_with_it(model: Path) -> None:
    """llama.cpp has 128 bytes for a string: one of as many has no null behind it."""
    params = llama_cpp.llama_model_default_params()
    params.kv_overrides = overrides = override_array({"xquant.window": "x"})
    overrides[0].value.val_str = b"x" * 128
    loaded = llama_cpp.llama_model_load_from_file(str(model).encode(), params)
    options = llama_cpp.llama_context_default_params()
    options.type_k = options.type_v = fork.GGML_TYPE_XQUANT
    options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    assert not llama_cpp.llama_init_from_model(loaded, options)
    assert f'xquant.window = "{"x" * 128}" must be an integer' in fork.error()
    llama_cpp.llama_model_free(loaded)


def test_a_block_that_is_none(model: Path) -> None:
    for content in (b"GGUF", b"", plan_block({}), plan_block(keys_of(MAPPED))[:200]):
        with pytest.raises(ValueError, match=r"the plan is not a GGUF block with xquant\.version"):
            fork_reads(model, content)
    assert read_plan(model) is None


# ---- copies ----


def tensors(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(path).tensors}


def test_copies_keep_everything_else(model: Path, tmp_path: Path) -> None:
    out, again, plain = (tmp_path / name for name in ("out.gguf", "again.gguf", "plain.gguf"))
    keys = keys_of(MAPPED, made_by=Provenance("test"))
    copied: list[int] = []
    copy_with_keys(model, out, keys, copied.append)
    assert sum(copied) >= model.stat().st_size - 64
    assert tensors(out) == tensors(model)
    assert list(GGUFFile(out).keys) == list(GGUFFile(model).keys) + list(keys)
    plan, *_ = read_plan(out) or pytest.fail("no plan")
    assert plan == replace(MAPPED, preset="calibrated")
    copy_with_keys(out, again, keys_of(Plan.from_preset("xquant-tiny", 4)))
    llm = Llama(str(again), kv_type="xquant", n_ctx=512, verbose=False)
    assert llm.kv_cache_info()["v_bits"] == [1] * 4
    llm.close()
    llm = Llama(str(again), kv_type="xquant-small", n_ctx=512, verbose=False)  # what is asked for goes first
    assert llm.kv_cache_info()["v_bits"] == [2] * 4
    llm.close()
    copy_with_keys(again, plain, {})
    assert plain.read_bytes() == model.read_bytes()
    assert sorted(tmp_path.iterdir()) == sorted((out, again, plain))


def test_copies_of_split_models(model: Path, tmp_path: Path) -> None:
    source = [tmp_path / f"m-{i:05d}-of-00002.gguf" for i in (1, 2)]
    for part in source:
        part.write_bytes(model.read_bytes())
    keys = keys_of(MAPPED)
    with pytest.raises(ValueError, match=r"name the copy like NAME-00001-of-00002\.gguf"):
        copy_with_keys(source[0], tmp_path / "out.gguf", keys)
    with pytest.raises(ValueError, match="is part 2 of a split model: name its first part"):
        copy_with_keys(source[1], tmp_path / "n-00001-of-00002.gguf", keys)
    copy_with_keys(source[0], tmp_path / "n-00001-of-00002.gguf", keys)
    assert (tmp_path / "n-00002-of-00002.gguf").read_bytes() == model.read_bytes()
    assert read_plan(tmp_path / "n-00001-of-00002.gguf") is not None


def test_a_split_model_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written in parts by gguf, copied with a plan, loaded by the fork."""
    with monkeypatch.context() as patch:
        patch.setattr("gguf.GGUFWriter", partial(GGUFWriter, split_max_tensors=16))
        tiny_gguf.write(tmp_path / "m.gguf", SHAPE, tiny_gguf.random_weights(SHAPE))
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 2
    out = tmp_path / f"out-00001-of-{len(parts):05d}.gguf"
    copy_with_keys(parts[0], out, keys_of(Plan.from_preset("xquant-tiny", 4)))
    for part, copy in zip(parts, sorted(tmp_path.glob("out-*.gguf")), strict=True):
        assert tensors(copy) == tensors(part)
    for kv_plan, bits in ((None, 1), ({"preset": "xquant-small"}, 2)):
        llm = Llama(str(out), kv_type=None if kv_plan else "xquant", kv_plan=kv_plan, n_ctx=512, verbose=False)
        assert llm.kv_cache_info()["v_bits"] == [bits] * 4  # a kv_plan goes before the file's plan
        llm.close()


def test_copies_that_fail_leave_nothing(model: Path, tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_with_keys(model, tmp_path / "out.gguf", {}, interrupt)
    with pytest.raises(ValueError, match="is the model itself"):
        copy_with_keys(model, model, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", LIES)
def test_counts_sizes_and_alignments_that_lie_are_errors(model: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"is not a GGUF block with xquant\.version"):
        fork_reads(model, LIES[name][0])


@settings(max_examples=150, deadline=None)
@given(raw=damaged_plans())
def test_damaged_blocks_are_errors(model: Path, raw: bytes) -> None:
    """Any byte may be anything."""
    with pytest.raises(ValueError, match=r"xquant\."):
        fork_reads(model, raw)
