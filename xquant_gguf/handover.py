"""How a preset or a plan reaches a cache that is about to be made."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from xquant_gguf import fork
from xquant_gguf.kv_types import LLAMA_TYPES
from xquant_gguf.metadata import plan_block, plan_keys
from xquant_gguf.plan import Plan, PlanSource, Shape


def following(kv_type: str | None, plan: PlanSource | None) -> AbstractContextManager[None]:
    """XQuant caches that are made on this thread within the context follow a preset, or a plan that starts from it.

    kv_type: "xquant" without a plan leaves the choice to kv_overrides, the model's file, or else the default preset.
    Raises ValueError if the plan does not fit the model, when the context ends.
    """
    if kv_type is None or kv_type in LLAMA_TYPES or (kv_type == "xquant" and plan is None):
        return nullcontext()
    preset = kv_type

    def give(shapes: Sequence[Shape]) -> bytes:
        held = [i for i, shape in enumerate(shapes) if shape.heads > 0]
        if plan is None:
            return plan_block(plan_keys(Plan.from_preset(preset, len(held)), held, len(shapes)))
        found = Plan.load(plan, len(held), preset)
        found.check([shapes[i] for i in held])
        return plan_block(plan_keys(found, held, len(shapes)))

    return fork.plan_provider(give)
