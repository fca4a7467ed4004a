"""Plans in GGUF files, as Python writes and reads them; tests/fork/test_metadata.py is the fork's half."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.plans import BAD, HELD, MAPPED, N_HELD, SHAPE, changed, damaged_plans, keys_of, plans
from xquant_gguf.metadata import Key, Provenance, plan_block, read_plan
from xquant_gguf.plan import Plan


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=plans(), tokens=st.integers(0, 2**32 - 1))
def test_round_trip(tmp_path: Path, plan: Plan, tokens: int) -> None:
    made_by = Provenance("test", "ab" * 32, tokens)
    path = tmp_path / "plan.gguf"
    path.write_bytes(plan_block(keys_of(plan, made_by=made_by)))
    assert read_plan(path) == (plan, list(HELD), SHAPE.n_layer, made_by)
    assert Plan.load(plan.to_dict(), N_HELD) == plan


def test_files_from_before_open_bits_keep_open_pages_in_f16(tmp_path: Path) -> None:
    path = tmp_path / "old.gguf"
    path.write_bytes(plan_block(changed(keys_of(MAPPED), "open_bits", None)))
    found = read_plan(path)
    assert found is not None
    assert (MAPPED.open_bits, found[0].open_bits) == (8, 16)
    assert Plan.load({"window": 64}, 2).open_bits == 8  # what a dictionary leaves out is the preset's


def test_keys_of_files_from_before_they_could_be_rotated_are_not(tmp_path: Path) -> None:
    path = tmp_path / "old.gguf"
    path.write_bytes(plan_block(changed(keys_of(MAPPED), "k.rotate", None)))
    found = read_plan(path)
    assert found is not None
    assert [layer.k.rotate for layer in MAPPED.layers] == [True] * 4
    assert [layer.k.rotate for layer in found[0].layers] == [False] * 4


@pytest.mark.parametrize(("name", "key", "message"), BAD)
def test_bad_keys_are_named(tmp_path: Path, name: str, key: Key | None, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(plan_block(changed(keys_of(MAPPED), name, key)))
    with pytest.raises(ValueError, match=message):
        read_plan(path)


def answer(path: Path) -> str:
    """What reading a bad plan says; the path alone if there seems to be none."""
    try:
        return f"{path}: {read_plan(path)}"
    except ValueError as error:
        return str(error)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=damaged_plans())
def test_damaged_files_are_errors(tmp_path: Path, raw: bytes) -> None:
    """Any byte may be anything: an error that names the file, or a plan."""
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(raw)
    assert "damaged.gguf" in answer(damaged)
