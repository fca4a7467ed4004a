"""No verb uses more of a thread's stack than xquant.h says: threads of musl have 128 KiB in all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from support import remote
from support.pages_of_codes import Content, V, random_rows
from support.storage import BYTES, SEALED, Move, Storage
from xquant_gguf import codec
from xquant_gguf.plan import PAGE, Layer, Side

STACK = 100 << 10  # of xq_exec in xquant.h; the threads that the runner makes have 128 KiB
WIDTH = 576


@cache
def runner(kernels: str) -> remote.Remote:
    """A process with threads of small stacks; not as long as the others: it needs no emulator."""
    if kernels.startswith("arm-"):
        return remote.Remote(kernels, remote.qemu("max"), kernels.removeprefix("arm-"))
    return remote.Remote(f"small-{kernels}", [remote.build_here()], kernels)


@pytest.mark.parametrize(
    "kernels",
    [*codec.kernel_sets(), *(pytest.param(f"arm-{name}", marks=pytest.mark.arm) for name in ("neon-i8mm", "neon"))],
)
def test_the_widest_heads_fit_into_small_stacks(kernels: str) -> None:
    on = runner(kernels)
    rng = np.random.default_rng(0)
    rows = random_rows(rng, 1, 1, 2, WIDTH)
    source = Content(Layer(Side(4, 128), V), rows).put(on, 3)
    map_ = np.zeros(1, np.int32), np.zeros((1, WIDTH, WIDTH), np.float32)
    layer = Layer(Side(4, 32, "clip", "log8"), replace(V, bits=3, fit="clip", source=0))
    storage: Storage = Content(layer, rows, n_bytes=1).put(on, 3, source=source, map_=map_)
    q, keys = np.zeros((1, 9, 8, WIDTH), np.float32), np.zeros((1, PAGE, 1, WIDTH), np.float32)
    mask = rng.standard_normal((1, 9, 3 * PAGE)).astype(np.float16)
    plain = Layer(layer.k, V)
    latent = Content(plain, random_rows(rng, 1, 1, 2, WIDTH, WIDTH - 512), latent=512).put(on, 3)
    verbs: dict[str, Callable[[], Any]] = {
        "attend latent": lambda: latent.attend(q, [[0, SEALED, 1]], mask, softcap=1.0, max_bias=1.0, n_parts=2),
        "seal": lambda: storage.update([Move(0, 0)]),
        "unseal": lambda: storage.update(unseals=[Move(0, 0)]),
        "write": lambda: storage.write(np.zeros(1, np.int32), (keys[0, :1], keys[0, :1])),
        "attend": lambda: storage.attend(q, [[0, SEALED, 1]], mask, softcap=1.0, max_bias=1.0, n_parts=2),
        "unpack": lambda: storage.unpack([[SEALED]], False),
        "read_keys": lambda: storage.read_keys([Move(0, SEALED)]),
        "write_keys": lambda: storage.write_keys([Move(0, SEALED)], keys),
        "shrink": lambda: storage.update([Move(0, 0, small=BYTES)]),
        "widen": lambda: storage.update(unseals=[Move(0, 0, small=BYTES)]),
        "seal bytes": lambda: storage.update([Move(0, BYTES)]),
        "attend bytes": lambda: storage.attend(q, [[0, SEALED, BYTES]], mask, softcap=1.0, max_bias=1.0, n_parts=2),
        "write bytes": lambda: storage.write_keys([Move(0, BYTES)], keys),
    }
    used = {}
    for name, verb in verbs.items():
        verb()
        used[name] = on.stack
    print({name: f"{n / 1024:.1f} KiB" for name, n in used.items()})
    assert max(used.values()) <= STACK
