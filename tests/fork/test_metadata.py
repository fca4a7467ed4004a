"""Plans in GGUF files: written and read back equal, by Python and by the fork; bad ones are named; copies."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import tiny_gguf
from xquant_gguf import Llama, fork
from xquant_gguf.gguf_file import GGUFFile
from xquant_gguf.metadata import Key, Provenance, copy_with_keys, plan_block, plan_keys, read_plan
from xquant_gguf.plan import Layer, Plan, Side, ValueMap, shortest
from xquant_gguf.session import Model, override_array

SHAPE = tiny_gguf.Shape(arch="mimo2", n_layer=5)  # the last layer is a sliding one
N_HELD, E, HEADS = 4, SHAPE.value_length, SHAPE.n_head_kv
I32 = GGUFValueType.INT32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("metadata") / "model.gguf"
    return Path(tiny_gguf.write(path, SHAPE, tiny_gguf.random_weights(SHAPE)))


etas = st.integers(0, 499).map(lambda n: n / 1000)
own_keys = st.builds(
    Side, st.integers(0, 4), st.sampled_from((32, 64, 128)), st.sampled_from(("paper", "minmax", "clip", "lloyd")),
    st.sampled_from(("f16", "log8")), eta=etas,
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
        if owners and draw(st.booleans()):
            owner = draw(st.sampled_from(owners))
            k = Side(layers[owner].k.bits, k.group, "lsq", "f16", False, owner, k.eta)
        sources = [j for j, layer in enumerate(layers) if layer.v.owner < 0 and layer.v.source < 0]
        if sources and draw(st.booleans()):
            v = replace(v, source=draw(st.sampled_from(sources)))
            rng = np.random.default_rng(draw(st.integers(0, 9)))
            weight = rng.standard_normal((HEADS, E, E)).astype("<f2").tobytes()
            maps[i] = ValueMap(tuple(int(h) for h in rng.integers(0, HEADS, HEADS)), weight)
        layers.append(Layer(k, v))
    window, pinned = draw(st.integers(-1, 4096)), draw(st.integers(0, 64))
    kld = draw(st.none() | st.floats(0, 9, width=32).map(shortest))
    return Plan("calibrated", tuple(layers), window, pinned, maps, kld)


@contextmanager
def plan_file(keys: Mapping[str, Key]) -> Iterator[Path]:
    """A GGUF file with a plan alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.gguf"
        path.write_bytes(plan_block(keys))
        yield path


def fork_reads(model: Path, path: Path) -> Plan:
    provided = fork.plan_provider(lambda shapes: path.read_bytes())
    with Model(model, weights=False) as dry, provided, dry.session("xquant", n_ctx=1024) as session:
        found = fork.plan(session.ctx, "calibrated")
    assert found is not None
    return found[0]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=plans(), tokens=st.integers(0, 2**32 - 1))
def test_round_trip(model: Path, plan: Plan, tokens: int) -> None:
    made_by = Provenance("test", "ab" * 32, tokens)
    with plan_file(plan_keys(plan, [0, 1, 2, 3], SHAPE.n_layer, made_by)) as path:
        assert read_plan(path) == (plan, [0, 1, 2, 3], SHAPE.n_layer, made_by)
        assert replace(fork_reads(model, path), maps=plan.maps, expected_kld=plan.expected_kld) == plan
    assert Plan.load(plan.to_dict(), N_HELD) == plan


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
]


@pytest.mark.parametrize(("name", "key", "message"), BAD)
def test_bad_keys_are_named(model: Path, name: str, key: Key | None, message: str) -> None:
    """By Python and by the fork alike."""
    keys = plan_keys(MAPPED, [0, 1, 2, 3], SHAPE.n_layer)
    del keys["xquant." + name]
    if key is not None:
        keys["xquant." + name] = key
    with plan_file(keys) as path:
        with pytest.raises(ValueError, match=message):
            read_plan(path)
        with pytest.raises(ValueError, match=message):
            fork_reads(model, path)


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
    keys = {**plan_keys(MAPPED, [0, 1, 2, 3], SHAPE.n_layer), "xquant." + name: key}
    with plan_file(keys) as path, pytest.raises(ValueError, match=message):
        fork_reads(model, path)


def test_layers_that_do_not_fit_the_model(model: Path) -> None:
    with (
        plan_file(plan_keys(MAPPED, [0, 1, 2, 3], 7)) as path,
        pytest.raises(ValueError, match="7 entries long, must be 5"),
    ):
        fork_reads(model, path)


def test_a_name_of_any_length_is_told_in_64_bytes(model: Path) -> None:
    names = array(["b" * 1000] * SHAPE.n_layer, GGUFValueType.STRING)
    keys = {**plan_keys(MAPPED, [0, 1, 2, 3], SHAPE.n_layer), "xquant.k.fit": names}
    told = f'xquant.k.fit\\[0\\] is "{"b" * 64}", must be one of'
    with plan_file(keys) as path, pytest.raises(ValueError, match=told):
        fork_reads(model, path)


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


def test_a_plan_file_that_is_none(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for content in (b"GGUF", b"", plan_block({}), plan_block(plan_keys(MAPPED, [0, 1, 2, 3], SHAPE.n_layer))[:200]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"the plan is not a GGUF block with xquant\.version"):
            fork_reads(model, path)
    assert read_plan(model) is None


# ---- copies ----


def tensors(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(path).tensors}


def test_copies_keep_everything_else(model: Path, tmp_path: Path) -> None:
    out, again, plain = (tmp_path / name for name in ("out.gguf", "again.gguf", "plain.gguf"))
    keys = plan_keys(MAPPED, [0, 1, 2, 3], SHAPE.n_layer, Provenance("test"))
    copied: list[int] = []
    copy_with_keys(model, out, keys, copied.append)
    assert sum(copied) >= model.stat().st_size - 64
    assert tensors(out) == tensors(model)
    assert list(GGUFFile(out).keys) == list(GGUFFile(model).keys) + list(keys)
    plan, *_ = read_plan(out) or pytest.fail("no plan")
    assert plan == replace(MAPPED, preset="calibrated")
    copy_with_keys(out, again, plan_keys(Plan.from_preset("xquant-tiny", 4), [0, 1, 2, 3], SHAPE.n_layer))
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
    keys = plan_keys(MAPPED, [0, 1, 2, 3], SHAPE.n_layer)
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
        patch.setattr(tiny_gguf.gguf, "GGUFWriter", partial(GGUFWriter, split_max_tensors=16))
        tiny_gguf.write(tmp_path / "m.gguf", SHAPE, tiny_gguf.random_weights(SHAPE))
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 2
    out = tmp_path / f"out-00001-of-{len(parts):05d}.gguf"
    copy_with_keys(parts[0], out, plan_keys(Plan.from_preset("xquant-tiny", 4), [0, 1, 2, 3], SHAPE.n_layer))
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


def test_reader_of_heads_takes_every_type(tmp_path: Path) -> None:
    path = tmp_path / "types.gguf"
    writer = GGUFWriter(path, "llama")
    numbers = [t for t in GGUFValueType if t not in (GGUFValueType.STRING, GGUFValueType.ARRAY)]
    for t in numbers:
        writer.add_key_value(f"one.{t.name}", 1, t)
        writer.add_key_value(f"two.{t.name}", [1, 0], GGUFValueType.ARRAY, t)
    writer.add_key_value("two.STRING", ["a", ""], GGUFValueType.ARRAY, GGUFValueType.STRING)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    head = GGUFFile(path)
    for t in numbers:
        assert head.value(f"one.{t.name}") == 1
        assert list(head.value(f"two.{t.name}")) == [1, 0]
    assert head.value("two.STRING") == ["a", ""]


def head(n_tensors: int = 0, n_keys: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys) + rest + bytes(64)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def alignment(value: int) -> bytes:
    return head(n_keys=1, rest=text(b"general.alignment") + struct.pack("<II", GGUFValueType.UINT32, value))


LIES = {
    "keys": (head(n_keys=2**64 - 1), "keys, more than fit"),
    "tensors": (head(n_tensors=2**63), "tensors, more than fit"),
    "length of a string": (head(n_keys=1, rest=struct.pack("<Q", 2**64 - 1)), "bytes in a string, more than fit"),
    "length of a value": (
        head(n_keys=1, rest=text(b"a") + struct.pack("<IQ", GGUFValueType.STRING, 65)),
        "65 bytes in a string, more than fit",
    ),
    "length of an entry": (
        head(n_keys=1, rest=text(b"a") + struct.pack("<IIQQ", GGUFValueType.ARRAY, GGUFValueType.STRING, 1, 2**63)),
        "bytes in a string, more than fit",
    ),
    "number of strings": (
        head(n_keys=1, rest=text(b"a") + struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.STRING, 2**61)),
        "strings in a, more than fit",
    ),
    "length of an array": (
        head(n_keys=1, rest=text(b"a") + struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.UINT64, 2**61)),
        "numbers in a, more than fit",
    ),
    "dimensions": (head(n_tensors=1, rest=text(b"t") + struct.pack("<I", 2**32 - 1)), "dimensions of a tensor, more"),
    "alignment 0": (alignment(0), "general.alignment 0, must be a power of two"),
    "alignment 3": (alignment(3), "general.alignment 3, must be a power of two"),
}


@pytest.mark.parametrize("name", LIES)
def test_counts_sizes_and_alignments_that_lie_are_errors(model: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "lies.gguf"
    raw, message = LIES[name]
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        GGUFFile(path)
    with pytest.raises(ValueError, match=r"is not a GGUF block with xquant\.version"):
        fork_reads(model, path)


def answer(path: Path) -> str:
    """What reading a bad plan says; the path alone if there seems to be none."""
    try:
        return f"{path}: {read_plan(path)}"
    except ValueError as error:
        return str(error)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_errors(model: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Any byte may be anything: an error or a plan, in Python and in the fork's reader."""
    with plan_file(plan_keys(MAPPED, [0, 1, 2, 3], SHAPE.n_layer)) as path:
        raw = bytearray(path.read_bytes()[:6000])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(raw), 1600) - 1))
        raw[at] = data.draw(st.integers(0, 255))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(raw[: data.draw(st.sampled_from((len(raw), 1000, 300)))])
    # None: the key that says there is a plan was hit; else the weights are cut off
    assert "damaged.gguf" in answer(damaged)
    with pytest.raises(ValueError, match=r"damaged\.gguf|xquant\."):
        fork_reads(model, damaged)
