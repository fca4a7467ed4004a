"""What the 8-bit rounding of folded vectors does to attention over a real model's keys and values."""

from __future__ import annotations

import numpy as np

from support import real_rows
from xquant_gguf import codec

SETS = codec.kernel_sets()
# Errors of an output over the output, as norms: median, and worst over layers and queries.
# Measured with xquant over the prose: scalar 5.8e-7 and 1.7e-6; AVX2 and AVX-512, which round alike, 7.3e-3 and 3.6e-2.
EXACT, ROUNDED = (2e-6, 1e-5), (1.2e-2, 5e-2)


def test_rounding_over_real_keys_and_values(smollm2: str, prose: str) -> None:
    found = list(real_rows.errors(smollm2, prose, 768, "xquant", SETS))
    assert len(found) == 30 * real_rows.N_ROWS
    for name in SETS:
        errors = np.array([row[name] for row in found])
        median, worst = EXACT if name == "scalar" else ROUNDED
        assert np.median(errors) <= median, name
        assert errors.max() <= worst, name
