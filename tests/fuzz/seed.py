"""Writes a small plan with every kind of layer to the file that is named: what the fuzzer starts from."""

import sys
from dataclasses import replace
from pathlib import Path

from xquant_gguf.metadata import Provenance, plan_file, plan_keys
from xquant_gguf.plan import Plan, ValueMap

plan = Plan.from_preset("xquant-paper", 6)
mapped = replace(plan.layers[2], v=replace(plan.layers[2].v, source=0))
layers = (*plan.layers[:2], mapped, *plan.layers[3:])
plan = replace(plan, layers=layers, maps={2: ValueMap((0,), bytes(2 * 16))}, expected_kld=0.1)
with plan_file(plan_keys(plan, [0, 1, 2, 3, 4, 5], 6, Provenance("seed", "ab" * 32, 7))) as path:
    Path(sys.argv[1]).write_bytes(path.read_bytes())
