"""A model and a text as calibration sees them: keys and values, and what changed ones do to the answer.

The text is decoded once with an F16 cache.  Short passages of it are decoded again, all in one micro-batch, each behind
the cells of what stands before it, whenever keys or values in these cells were replaced by what codes would give back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from xquant_gguf import fork
from xquant_gguf.divergence import Expected, Logits
from xquant_gguf.plan import PAGE, Plan
from xquant_gguf.session import Model, Row, Session

Rows = NDArray[np.float16]  # [KV head][token][width]
Where = tuple[int, str]  # layer of the cache, "k" or "v"


def check_layers(model_path: str, layers: Sequence[int]) -> None:
    """ValueError if an XQuant cache holds no layers of a model."""
    if not layers:
        raise ValueError(f"{model_path}: all layers slide, and sliding layers stay F16: there is nothing to choose")


def unsealed(plan: Plan) -> Plan:
    """A plan under which all stays F16, and keys lie in the cache as they come."""
    plain = tuple(replace(layer, k=replace(layer.k, rotate=False)) for layer in plan.layers)
    return replace(plan, layers=plain, window=-1)


class Probe:
    """A loaded model; a context manager.  Everything runs on the CPU."""

    def __init__(self, model_path: str, n_threads: int | None = None) -> None:
        self._model = Model(model_path)
        self._n_threads = n_threads
        self.shapes, self.layers, self.n_layers = self._model.cache_layers
        check_layers(model_path, self.layers)
        plan = self._model.cache_plan
        self.rotates = [layer.k.rotate for layer in plan.layers]
        """Whether keys are stored rotated, by layer, where a plan asks for it.

        If they have a bias, a cache does better than the Hadamard matrix alone that calibration has in mind
        (native/llama/xquant-rotation.h), and coordinates of their own do better still.
        """
        self._f16 = unsealed(plan)

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self._model.close()

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text, without special ones."""
        return self._model.tokenize(text)

    @contextmanager
    def reading(
        self, tokens: Sequence[int], n_read: int, starts: Sequence[int] = (), length: int = 0, window: int = 0
    ) -> Iterator[Reading]:
        """The first n_read tokens of a text in an F16 cache, and passages of `length` tokens that begin at starts.

        window: how many tokens before a passage stay as they were when keys and values are changed.
        """
        numbered = list(enumerate(tokens))
        passages = [numbered[first - window : first + length] for first in starts]
        n_scored = len(passages) * length
        size = n_read + n_scored + len(passages) * window, max(n_scored, 2 * PAGE), len(passages) + 1
        # keys that hold values stay as they come, whatever queries are like
        own = {layer: s for layer, s in zip(self.layers, self.shapes, strict=True) if s.e >= s.d}
        moments = fork.QueryMoments(own)
        with self._session(self._f16, *size, moments=moments) as session:
            yield Reading(self, session, tokens[:n_read], passages, window, moments)

    def kld(self, plan: Plan, tokens: Sequence[int], skip: int) -> NDArray[np.float64]:
        """KL divergences from the F16 cache under a plan, in micro-batches of a page; skip: first ones not scored."""
        scored = [first for first in range(0, len(tokens), PAGE) if first >= skip]
        expected = [Expected(logits) for logits in self._pages(self._f16, tokens, scored)]
        found = zip(expected, self._pages(plan, tokens, scored), strict=True)
        return np.concatenate([right.kld(logits) for right, logits in found])

    def _pages(self, plan: Plan, tokens: Sequence[int], scored: Sequence[int]) -> Iterator[Logits]:
        """Logits of the pages of a text that begin at `scored`, one by one."""
        with self._session(plan, len(tokens), PAGE) as session:
            for first in range(0, len(tokens), PAGE):
                page = tokens[first : first + PAGE]
                rows = [(token, first + i, (0,)) for i, token in enumerate(page)]
                session.decode(rows, "all" if first in scored else "none")
                if first in scored:
                    yield session.logits(len(rows))

    def _session(
        self, plan: Plan, n_ctx: int, n_ubatch: int, n_seq: int = 1, moments: fork.QueryMoments | None = None
    ) -> Session:
        """A context that follows a plan; its sequences share their cells."""
        return self._model.session(
            "xquant",
            n_ctx=n_ctx,
            n_ubatch=n_ubatch,
            n_seq=n_seq,
            n_threads=self._n_threads,
            swa_full=True,
            plan=plan,
            moments=moments,
        )


class Reading:
    """A text in an F16 cache.

    rows: its keys and values, as the cache stores them; latent layers have no values.  queries: second moments
    [KV head][d][d] of those that read them, a query head's for each token added up, by layer, but for layers whose keys
    hold values.
    """

    def __init__(
        self,
        probe: Probe,
        session: Session,
        tokens: Sequence[int],
        passages: Sequence[Sequence[tuple[int, int]]],
        window: int,
        moments: fork.QueryMoments,
    ) -> None:
        """passages: (position, token); each is a sequence of its own, that has cells of its own for them, and the
        text's for all before.  Those behind the first `window` are scored."""
        self._probe, self._session, self.n_layers = probe, session, len(probe.layers)
        self._read([(token, position, (0,)) for position, token in enumerate(tokens)])
        moments.stop()
        self.queries = {
            i: moments.sums[layer] / len(tokens) for i, layer in enumerate(probe.layers) if layer in moments.sums
        }
        numbered = list(zip(probe.layers, probe.shapes, strict=True))
        self.rows: dict[Where, Rows] = {
            (i, name): np.stack(
                [fork.read_rows(session.ctx, layer, name, h, len(tokens), width) for h in range(shape.heads)]
            )
            for i, (layer, shape) in enumerate(numbered)
            for name, width in (("k", shape.d), ("v", shape.e))
            if width > 0
        }
        self._starts = {s: passage[window][0] for s, passage in enumerate(passages, 1)}
        self._scored = [(token, at, (s,)) for s, passage in enumerate(passages, 1) for at, token in passage[window:]]
        for sequence, first in self._starts.items():
            session.copy(0, sequence, 0, first - window)
        self._read([(token, at, (s,)) for s, passage in enumerate(passages, 1) for at, token in passage[:window]])
        self._expected = Expected(self._answer()) if passages else None

    def _read(self, rows: Sequence[Row]) -> None:
        """Puts (token, position, sequences) into the cache."""
        for first in range(0, len(rows), self._session.n_ubatch):
            self._session.decode(rows[first : first + self._session.n_ubatch], "none")

    def kld(self, changed: Mapping[Where, Rows]) -> NDArray[np.float64]:
        """KL divergences at all tokens of the passages, if the first tokens' keys and values were these."""
        assert self._expected is not None
        self._write(changed)
        try:
            return self._expected.kld(self._answer())
        finally:
            self._write({where: self.rows[where][:, : rows.shape[1]] for where, rows in changed.items()})

    def _write(self, changed: Mapping[Where, Rows]) -> None:
        for (i, name), rows in changed.items():
            for h, head in enumerate(rows):
                fork.write_rows(self._session.ctx, self._probe.layers[i], name, h, head)

    def _answer(self) -> Logits:
        for sequence, first in self._starts.items():
            self._session.remove(sequence, first)
        self._session.decode(self._scored)
        return self._session.logits(len(self._scored))
