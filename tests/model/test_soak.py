"""The long chat of benchmarks/soak.py, short and on a tiny model; and its figures of a context shift."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import shift
import soak
from support import tiny_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    shape = tiny_gguf.Shape()
    return str(tiny_gguf.write(tmp_path_factory.mktemp("soak") / "tiny.gguf", shape, tiny_gguf.random_weights(shape)))


class Mallinfo(ctypes.Structure):
    """struct mallinfo2 of glibc; uordblks and hblkhd: bytes that malloc has handed out, in its arenas and by mmap."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def handed_out() -> float:
    """MiB that malloc has handed out to this process and not got back: what a leak adds to, and nothing else does."""
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    info = mallinfo()
    return float((info.uordblks + info.hblkhd) / 2**20)


def test_memory_and_quality_stay_flat(model: str, prose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("needs glibc 2.33 or newer to count what malloc hands out")
    monkeypatch.setattr(soak, "resident", handed_out)
    turns = soak.soak(model, prose, kv_type="xquant", minutes=0, turns=60, n_ctx=1024, n_ubatch=64, n_threads=1)
    first, last = turns[15:35], turns[40:]
    assert sum(turn.kept for turn in last) > 0.2 * sum(turn.length for turn in last)  # measured: 0.72
    assert max(turn.sealed for turn in last) > 1
    assert max(turn.shifts for turn in turns) > 0
    # measured: 0.03 MiB in 25 turns, which is what turns told take; of a turn, prompts of other lengths: 0.06
    assert abs(np.mean([turn.mib for turn in last]) - np.mean([turn.mib for turn in first])) < 0.25
    # each against a fresh cache with the same text: what was cut off and written again left nothing behind
    pairs = np.array([(turn.kld, turn.fresh) for turn in turns if turn.fresh == turn.fresh])
    assert len(pairs) > 10
    aged, fresh = pairs.sum(axis=0)
    assert 0 < aged < 1.15 * fresh  # measured: 1.08
    assert "aged - fresh" in soak.report(turns)


def test_shifts_are_compared(model: str, prose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shift codes the keys of sealed pages once more, and does nothing else to what is stored.

    Measured on one model: eight shifts add 0.4 times what fine codes do, most of which is the values' share."""
    text, fine, out = tmp_path / "text", tmp_path / "fine.json", tmp_path / "out.json"
    text.write_text(prose)
    values = {"bits": 4, "group": 32, "fit": "minmax", "param": "f16", "eta": 0.0}
    fine.write_text(json.dumps({"layers": {"0-3": {"v": values}}}))
    options = ["--tokens", "1280", "--scored", "64", "--kv-types", f"q8_0,xquant,{fine}", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["shift.py", model, "--text", str(text), *options, "--json", str(out)])
    assert shift.main() == 0
    kld = {(row["kv_type"], row["shifts"]): row["kld"] for row in json.loads(out.read_text())}

    before, once, often = (kld[str(fine), n] for n in (0, 1, 8))
    assert 0 < before < 0.25 * kld["xquant", 0]
    assert kld["q8_0", 8] < 0.1 * before
    assert abs(once - before) < 0.3 * before
    assert 1.1 * before < often < 3 * before
