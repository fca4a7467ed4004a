"""Writes what the fuzzers start from to a folder: models/ (tiny ones), corpus/metadata/ (plans as GGUF files),
corpus/codec/, corpus/verbs/ and corpus/nodes/ (random bytes, long enough for a layer and what is done with it).

The seeds of states come from the fuzz target itself.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support import tiny_gguf
from xquant_gguf.metadata import Provenance, copy_with_keys, plan_block, plan_keys
from xquant_gguf.plan import Plan, ValueMap

WIDTH, N_LAYER = 16, 3
SIZES = {"n_layer": N_LAYER, "n_embd": 32, "n_ff": 32, "n_head": 2, "n_head_kv": 1, "key_length": WIDTH}
SIZES |= {"value_length": WIDTH}


def plans() -> dict[str, Plan]:
    """Every kind of layer: own codes, borrowed codes, a map."""
    mixed = Plan.from_preset("xquant", N_LAYER)
    first, second, third = mixed.layers
    second = replace(second, v=replace(second.v, source=0))
    third = replace(third, k=replace(first.k, fit="lsq", param="f16", owner=0))
    weight = np.random.default_rng(1).standard_normal((1, WIDTH, WIDTH)).astype("<f2").tobytes()
    maps = {1: ValueMap((0,), weight)}
    mixed = replace(mixed, layers=(first, second, third), window=0, pinned=0, maps=maps, expected_kld=0.1)
    return {"mixed": mixed} | {name: Plan.from_preset(name, N_LAYER) for name in ("xquant-tiny", "xquant-paper")}


def main(folder: Path) -> None:
    models, corpus = folder / "models", folder / "corpus" / "metadata"
    random = [folder / "corpus" / name for name in ("codec", "verbs", "nodes")]
    for path in (models, corpus, *random):
        path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(300):
        (random[i % 2] / f"random-{i}").write_bytes(rng.bytes(int(rng.integers(60, 3000))))
    for name, arch in (("plain", "llama"), ("sliding", "mimo2")):
        shape = tiny_gguf.Shape(arch=arch, **SIZES)
        tiny_gguf.write(models / f"{name}.gguf", shape, tiny_gguf.random_weights(shape))
    for name, plan in plans().items():
        keys = plan_keys(plan, range(N_LAYER), N_LAYER, Provenance("seed", "ab" * 32, 7))
        (corpus / name).write_bytes(plan_block(keys))
        if name == "mixed":
            copy_with_keys(models / "plain.gguf", models / "mixed.gguf", keys)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
