"""The CPU kernels of llama.cpp that bounds, and figures that must come out again, were measured with: those for AVX2,
whose sums decide which codes flip.  tests/fork/test_cpu_variants.py runs the others.
"""

from __future__ import annotations

import os

from xquant_gguf import native


def choose() -> None:
    """Takes them before llama.cpp runs, here and in processes that are started, unless the environment names others."""
    if (native.LIBRARY_DIR / "libxquant-cpu-avx2.so").exists():
        os.environ.setdefault("XQUANT_CPU_VARIANT", "avx2")
