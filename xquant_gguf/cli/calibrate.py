"""The command calibrate."""

from __future__ import annotations

import argparse
from pathlib import Path

from xquant_gguf.calibrate import Budget, Calibration, calibrate, unmeasured
from xquant_gguf.cli.options import Commands, add_command
from xquant_gguf.cli.strip import copy_model
from xquant_gguf.cli.text import table, write_json
from xquant_gguf.plan import PAGE, preset_names


def run(args: argparse.Namespace) -> int:
    if not args.output and not args.metadata_only:
        raise ValueError("name an output file, or --metadata-only FILE.json")
    if args.json and (args.data_free or args.preset):
        raise ValueError("--json holds what was measured, and --data-free and --preset measure nothing: leave one out")
    budget = Budget(args.bits, False) if args.equivalent_bits is None else Budget(args.equivalent_bits, True)
    if args.data_free or args.preset:
        result = unmeasured(args.model, budget, args.preset)
    else:
        text = Path(args.text).read_text(encoding="utf-8") if args.text else None
        result = calibrate(args.model, budget, text=text, n_threads=args.threads, maps=not args.no_maps)
    print(plan_text(result))
    if args.metadata_only:
        write_json(args.metadata_only, result.plan.to_dict())
        print(f"plan: {args.metadata_only}")
    if args.json:
        write_json(args.json, {"model": Path(args.model).name, **result.to_dict()})
    if args.output:
        copy_model(args.model, args.output, result.keys())
    return 0


def plan_text(result: Calibration) -> str:
    """A plan as a table, with its quality and its sizes."""
    plan, shapes = result.plan, result.shapes
    rows = [["layer", "K", "V", *(["harm of K1", "of V1"] if result.sensitivity else [])]]
    for i, (number, layer, shape) in enumerate(zip(result.layers, plan.layers, shapes, strict=True)):
        k = f"{layer.k.bits} bits" + (f", {layer.k.group} tokens" if layer.k.group != PAGE else "")
        v = f"{layer.v.bits} bits" + (f" + layer {result.layers[layer.v.source]}" if layer.v.source >= 0 else "")
        v = v if shape.e else "part of K"
        rows.append([str(number), k + f", {layer.k.param}", v, *(f"{s[i]:.5f}" for s in result.sensitivity.values())])
    true, equivalent = plan.true_bits(shapes), plan.equivalent_bits(shapes)
    lines = [f"{plan.preset}: {true:.3f} true bits, {equivalent:.3f} equivalent bits a value"]
    if plan.expected_kld is not None:
        lines.append(f"expected KL divergence from F16: {plan.expected_kld:.4f}")
    sizes = [["tokens", "MiB", "F16 / this"]]
    for n_ctx in (4096, 32768, 131072):
        f16 = 2 * n_ctx * sum((s.d + s.e) * s.heads for s in shapes)
        size = plan.cache_bytes(shapes, n_ctx)
        sizes.append([str(n_ctx), f"{size / 2**20:.1f}", f"{f16 / size:.2f}"])
    return "\n".join([*lines, "", table(rows), "", table(sizes), ""])


def add(commands: Commands) -> None:
    """Declares it."""
    text = "choose the best cache for a model and write it into a copy of its file"
    sub = add_command(commands, "calibrate", run, text)
    sub.add_argument("output", nargs="?", help="the copy to write")
    size = sub.add_mutually_exclusive_group()
    size.add_argument("--bits", type=float, default=3.0, help="true bits a value (default %(default)s)")
    size.add_argument("--equivalent-bits", type=float, help="bits of codes a value, as the paper counts them")
    size.add_argument("--preset", choices=preset_names(), help="write this preset, measure nothing")
    sub.add_argument("--text", help="text to measure with, at least 1,280 tokens (default: a built-in one)")
    sub.add_argument("--data-free", action="store_true", help="derive the plan from the architecture alone")
    sub.add_argument("--no-maps", action="store_true", help="predict no layer's values from another's")
    sub.add_argument("--metadata-only", metavar="FILE.json", help="write the plan, for kv_plan")
    sub.add_argument("--json", metavar="FILE.json", help="write the plan, each layer's sensitivity, and what made it")
