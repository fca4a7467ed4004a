"""Pictures: what is drawn where, and which files are refused."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from xquant_gguf.cli import main
from xquant_gguf.plot import draw_pareto, draw_sensitivity, plot

BITS_KLD = {
    "f16": (16, 0.0),
    "q4_0": (4.5, 0.05),
    "xquant": (3.25, 0.01),
    "other": (2.0, 0.04),
    "dir/best-2.json": (2.0, 0.03),
}
EVALUATED: dict[str, Any] = {
    "model": "m.gguf",
    "results": [{"kv_type": kv, "true_bits": bits, "kld": kld} for kv, (bits, kld) in BITS_KLD.items()],
}
CALIBRATED: dict[str, Any] = {"model": "m.gguf", "layers": [0, 2, 5], "sensitivity": {"k": [1, 2, 3], "v": [0.1, 0, 1]}}


def test_pareto() -> None:
    """All types but F16 are marked and named; the line joins those that none beats in bits and harm."""
    ax = Figure().subplots()
    draw_pareto(ax, EVALUATED)
    marked = [tuple(point) for points in ax.collections for point in points.get_offsets().tolist()]
    assert sorted(marked) == [(2.0, 0.03), (2.0, 0.04), (3.25, 0.01), (4.5, 0.05)]
    assert sorted(text.get_text() for text in ax.texts) == ["best-2", "other", "q4_0", "xquant"]
    assert [line.get_xydata().tolist() for line in ax.lines] == [[[2.0, 0.03], [3.25, 0.01]]]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_families() -> None:
    """Each has its own line and colour, and they are named; what another family does better is no reason to leave."""
    rows = [{**row, "family": "ours" if i else "theirs"} for i, row in enumerate(EVALUATED["results"][1:])]
    ax = Figure().subplots()
    draw_pareto(ax, {"results": rows})
    assert [line.get_xydata().tolist() for line in ax.lines] == [[[2.0, 0.03], [3.25, 0.01]], [[4.5, 0.05]]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["ours", "theirs"]
    assert len({points.get_facecolor().tobytes() for points in ax.collections}) == 2


def test_sensitivity() -> None:
    ax = Figure().subplots()
    draw_sensitivity(ax, CALIBRATED)
    assert [line.get_xydata().tolist() for line in ax.lines] == [
        [[0, 1], [2, 2], [5, 3]],
        [[0, 0.1], [2, 0], [5, 1]],
    ]


def test_command(tmp_path: Path) -> None:
    """A valid PNG with a panel for each file, two in a row."""
    sizes = []
    for files in ([EVALUATED], [EVALUATED, CALIBRATED, EVALUATED]):
        paths = [tmp_path / f"{i}.json" for i in range(len(files))]
        for path, content in zip(paths, files, strict=True):
            path.write_text(json.dumps(content))
        out = tmp_path / "out.png"
        assert main(["plot", *map(str, paths), "--out", str(out)]) == 0
        head = out.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        sizes.append(struct.unpack(">II", head[16:]))
    assert sizes[1] == tuple(2 * n for n in sizes[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "is not JSON"),
        ("[1]", "has neither results of evaluate"),
        ('{"results": []}', "has neither results of evaluate"),
        ('{"results": [{"kv_type": "f16", "score": 1, "true_bits": 16}]}', "must have the numbers kld and true_bits"),
        ('{"layers": [0, 1], "sensitivity": {"k": [1], "v": [1, 2]}}', "a number for keys and values of each layer"),
        ('{"layers": [], "sensitivity": {}}', "a number for keys and values of each layer"),
    ],
)
def test_files_that_hold_nothing_to_draw(
    content: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "bad.json", tmp_path / "out.png"
    path.write_text(content)
    assert main(["plot", str(path), "--out", str(out)]) == 1
    err = capfd.readouterr().err.strip()
    assert err.startswith(f"xquant-gguf: {path}: ")
    assert message in err
    assert not out.exists()


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'xquant-gguf\[plot\]'"):
        plot(["x.json"], str(tmp_path / "out.png"))
