"""Pictures: KL divergence against true bits from evaluate's results, sensitivity by layer from calibrate's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xquant_gguf.metadata import written_beside

SIDES = {"k": "keys", "v": "values"}


def read_results(path: str) -> dict[str, Any]:
    """A file of evaluate or calibrate; ValueError names the file and what it lacks."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error
    if isinstance(found, dict) and isinstance(found.get("sensitivity"), dict):
        sides, layers = found["sensitivity"], found.get("layers")
        if not isinstance(layers, list) or not all(_numbers(sides.get(s), len(layers)) for s in SIDES):
            raise ValueError(f"{path}: sensitivity must have a number for keys and values of each layer")
        return found
    rows = found.get("results") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: has neither results of evaluate --text nor a sensitivity of calibrate --json")
    for row in rows:
        if not isinstance(row, dict) or not _numbers([row.get("kld"), row.get("true_bits")], 2):
            raise ValueError(f"{path}: a result must have the numbers kld and true_bits, as evaluate --text writes it")
    return found


def _numbers(values: Any, n: int) -> bool:
    return isinstance(values, list) and len(values) == n and all(isinstance(v, int | float) for v in values)


def plot(paths: Sequence[str], out: str) -> None:
    """Draws result files into one PNG, a panel for each.

    Raises ImportError, which names the extra, if matplotlib is missing; ValueError if a file holds nothing to draw.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs the package matplotlib: pip install 'xquant-gguf[plot]'") from error
    found = [read_results(path) for path in paths]
    columns = min(len(found), 2)
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(6.5 * columns, 5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, result in zip(axes, found, strict=False):
        (draw_sensitivity if "sensitivity" in result else draw_pareto)(ax, result)
        ax.set_title(str(result.get("model", "")), fontsize=9)
        ax.set_ylabel("mean KL divergence from F16")
        ax.grid(True, alpha=0.3)
    for ax in axes[len(found) :]:
        ax.set_axis_off()
    evaluated = [ax for ax, result in zip(axes, found, strict=False) if "sensitivity" not in result]
    for ax in evaluated[1:]:
        ax.sharey(evaluated[0])
        ax.autoscale(axis="y")
    with written_beside(Path(out)) as part:
        figure.savefig(part, format="png", dpi=100)


def draw_pareto(ax: Any, result: Mapping[str, Any]) -> None:
    """A marker for each KV type, and a line along those that no other of their family beats.

    A result may name its family; without names all are one.  F16 itself, with a KL divergence of 0, is not on a
    logarithmic scale.
    """
    rows = sorted((r for r in result["results"] if r["kld"] > 0), key=lambda r: (r["true_bits"], r["kld"]))
    bits = [row["true_bits"] for row in rows]
    families: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        families.setdefault(str(row.get("family", "")), []).append(row)
    for family, own in sorted(families.items()):
        best = [row for i, row in enumerate(own) if all(row["kld"] < other["kld"] for other in own[:i])]
        (line,) = ax.plot([r["true_bits"] for r in best], [r["kld"] for r in best], linewidth=1, alpha=0.6)
        points = [r["true_bits"] for r in own], [r["kld"] for r in own]
        ax.scatter(*points, s=28, color=line.get_color(), label=family)
        for row in own:
            aside = {"ha": "right", "xytext": (-5, -7)} if row in best else {"ha": "left", "xytext": (5, 3)}
            ax.annotate(label(row), (row["true_bits"], row["kld"]), textcoords="offset points", fontsize=7, **aside)
    if len(families) > 1:
        ax.legend(fontsize=8)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ticks = [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_xlim(0.7 * min(bits, default=1), 1.2 * max(bits, default=16))
    ax.set_xlabel("true bits a value")


def label(row: Mapping[str, Any]) -> str:
    """A KV type, or the name of a plan's file without folder and suffix."""
    name = str(row.get("kv_type", "?"))
    return Path(name).stem if name.endswith(".json") else name


def draw_sensitivity(ax: Any, result: Mapping[str, Any]) -> None:
    """The KL divergence that 1-bit keys, or values, of each layer alone cause."""
    for side, name in SIDES.items():
        ax.plot(result["layers"], result["sensitivity"][side], marker=".", linewidth=1, label=f"1-bit {name}")
    ax.set_yscale("log")
    ax.set_xlabel("layer")
    ax.legend(fontsize=8)
