"""One model with one type of cache, in a process of its own.

usage: python -m support.model_run MODEL TYPE MICRO_BATCH FOLDER [short]

Writes FOLDER/<step>.npy with logits after each step, and FOLDER/told.json with what the context said. A step that ends
the process leaves those before it. Types: a cache type of llama.cpp; `open`: XQuant, with a plan that never seals;
`sealed`: XQuant's default plan; `specified`: `open`, in which keys and values were made by numpy what sealing makes of
them. The last two are compared with each other behind a prompt of one micro-batch, whose keys and values nothing sealed
has touched; `sealed` takes the other steps as well.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support.contexts import Logits, llama_cpp
from xquant_gguf import fork, reference
from xquant_gguf.plan import PAGE, Layer
from xquant_gguf.session import Model, Session

N_CTX, MORE = 2048, 40
WHOLE = 640  # a micro-batch that takes the prompt whole
XQUANT = ("open", "sealed", "specified")


@dataclass(frozen=True)
class Length:
    """Tokens of the prompt; where the tail is cut off; pages of the prompt that are sealed behind it."""

    prompt: int
    cut: int
    sealed: tuple[int, ...]


LONG = Length(600, 500, (1, 2))  # behind the pinned page, and out of the window of the token that follows the prompt
SHORT = Length(130, 120, (0,))  # for models of 256 learned positions, with a plan without window and pinned pages


def tokens_of(n_vocab: int) -> list[int]:
    return np.random.default_rng(7).integers(min(3, n_vocab - 1), n_vocab, 900).tolist()


def made(model: Model, kind: str, n_ubatch: int) -> Session:
    ours = kind in XQUANT
    # llama.cpp's own flash attention rounds more than what is looked for here
    flash = kind != "f16"
    return model.session(
        "xquant" if ours else kind,
        n_ctx=N_CTX, n_batch=N_CTX, n_ubatch=n_ubatch, n_threads=1, flash_attn=flash, plan={} if ours else None,
    )  # fmt: skip


def steps(session: Session, tokens: list[int], length: Length) -> Any:
    """(name, logits) of each step; those that a cache cannot do are left out."""

    def go_on(name: str, count: int, first: int) -> tuple[str, Logits]:
        return name, session.answer(tokens[-count:], first).copy()

    n = length.prompt
    yield "prompt", session.answer(tokens[:n], 0)[-50:].copy()
    yield "decode", np.concatenate([session.answer(tokens[n + i : n + i + 1], n + i).copy() for i in range(20)])
    state = session.save(0)
    if session.remove(0, length.cut):
        yield go_on("removal of the tail", 60, length.cut)
    session.load(state, 0)
    yield go_on("state", MORE, n + 20)
    if length is SHORT or not llama_cpp.llama_memory_can_shift(session.memory):
        return
    session.clear()
    session.answer(tokens[:300], 0)
    if session.remove(0, 20, 60):
        session.shift(0, 60, -1, -40)
        yield go_on("shift", MORE, 260)


def specify(session: Session, length: Length) -> None:
    """Makes keys and values of pages, which lie open, what the default plan makes of them when it seals them."""
    found = fork.plan(session.ctx, "xquant")
    assert found
    plan, shapes, numbers = found
    everyone = np.ones(PAGE, bool)
    for layer, shape, number in zip(plan.layers, shapes, numbers, strict=True):
        for name, width in (("k", shape.d), ("v", shape.e))[: 2 if shape.e else 1]:
            for head in range(shape.heads):
                rows = fork.read_rows(session.ctx, number, name, head, length.prompt, width)
                for page in length.sealed:
                    at = slice(page * PAGE, (page + 1) * PAGE)
                    rows[at] = sealed(layer, name, rows[at], everyone)
                fork.write_rows(session.ctx, number, name, head, rows)


def sealed(layer: Layer, name: str, rows: Any, valid: Any) -> Any:
    if name == "k":
        return reference.dequantize_k(layer.k, rows.shape[1], *reference.seal_k(layer.k, rows, valid)[:2])
    return reference.dequantize_v(layer.v, rows.shape[1], *reference.seal_v(layer.v, rows, valid)[:2])


def overrides_of(kind: str, length: Length) -> dict[str, int]:
    if kind in ("open", "specified"):
        return {"xquant.window": -1}
    return {"xquant.window": 0, "xquant.pinned": 0} if kind == "sealed" and length is SHORT else {}


def main(path: str, kind: str, n_ubatch: int, folder: Path, length: Length) -> None:
    with Model(path, n_gpu_layers=0, overrides=overrides_of(kind, length)) as m:
        told: dict[str, Any] = {
            "hybrid": bool(llama_cpp.llama_model_is_hybrid(m.handle)),
            "recurrent": bool(llama_cpp.llama_model_is_recurrent(m.handle)),
            "sliding": int(llama_cpp.llama_model_n_swa(m.handle)) > 0,
        }

        def tell(**more: Any) -> None:
            told.update(more)
            (folder / "told.json").write_text(json.dumps(told))

        tell()
        try:
            session = made(m, kind, n_ubatch)
        except ValueError as error:
            tell(refused=str(error))
            return
        with session:
            tokens = tokens_of(session.n_vocab)
            if kind in XQUANT:
                tell(shapes=sorted({(shape.d, shape.e) for shape in fork.layers(session.ctx)[0]}))
            if kind in ("sealed", "specified") and n_ubatch == WHOLE:
                n = length.prompt
                session.answer(tokens[:n], 0)
                if kind == "specified":
                    specify(session, length)
                np.save(folder / "next", session.answer(tokens[n : n + MORE], n).copy())
                tell(sealed=[i for i, page in enumerate(fork.pages(session.ctx)) if page.n_cells and not page.is_open])
            else:
                for name, logits in steps(session, tokens, length):
                    np.save(folder / name, logits)
        tell(done=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]), SHORT if sys.argv[5:] == ["short"] else LONG)
