"""Write tests/golden/codec.json: sealed pages of the numpy reference, to hold both codecs to what they were.

usage: make_golden.py   (run it only when the format or a fit changes on purpose)
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from xquant_gguf import reference
from xquant_gguf.plan import PAGE, Side

SIDES = [
    ("k", Side(4, 128, "minmax", "f16")),
    ("k", Side(3, 64, "minmax", "f16", eta=0.02)),
    ("k", Side(2, 32, "paper", "f16", eta=0.045)),
    ("k", Side(1, 128, "clip", "f16")),
    ("v", Side(2, 0, "lloyd", "log8", rotate=True, eta=0.09)),
    ("v", Side(1, 0, "lloyd", "log8", rotate=True, eta=0.3)),
    ("v", Side(4, 32, "clip", "f16")),
    ("v", Side(0, 32, "minmax", "f16")),
    ("k", Side(3, 32, "lloyd", "log8", eta=0.02)),
    ("v", Side(2, 32, "paper", "f16", owner=0, eta=0.045)),
    ("k", Side(1, 128, "lsq", "f16", owner=0)),
]


def main() -> None:
    rng = np.random.default_rng(20251023)
    cases = []
    for name, side in SIDES:
        rows = (rng.standard_normal((PAGE, 32)) + 8 * (rng.random(32) < 0.1)).astype(np.float16)
        seal = reference.seal_k if name == "k" else reference.seal_v
        # codes to borrow: any will do
        owner = rng.bytes(len(reference.pack(np.zeros((PAGE, 32), np.uint8), side.bits))) if side.owner >= 0 else None
        codes, param, _ = seal(side, rows, np.ones(PAGE, bool), owner)
        case = {"name": name, "side": asdict(side), "rows": rows.tobytes().hex()}
        borrowed = None if owner is None else owner.hex()
        cases.append({**case, "owner_codes": borrowed, "codes": codes.hex(), "param": param.hex()})
    path = Path(__file__).parent.parent / "tests" / "golden" / "codec.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
