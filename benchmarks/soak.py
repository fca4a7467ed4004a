"""A chat that goes on for hours, on an XQuant and on an F16 cache in step: do memory and KL divergence stay flat?

usage: soak.py MODEL --text FILE [--minutes 60 | --turns N] [--kv-type xquant] [--n-ctx 2048] [--json FILE]

A turn is a message from the text and an answer that is sampled from the XQuant cache.  As llama_cpp's generate does,
the longest common beginning of the last prompt and of this one is kept and the rest is cut off.  Chats start anew now
and then with the same system message, and a last message is asked again in other words.  When the context is full, the
oldest turns are dropped until it is half full: in some chats the rest is decoded again, in others it is shifted.  The
F16 cache is given the same tokens and the same operations.

Longer contexts and harder texts raise the KL divergence too.  So turns are compared at equal length, and some are
decoded once more in an empty XQuant cache: "aged - fresh" is what all that was done to the cache adds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xquant_gguf.cli.text import table
from xquant_gguf.divergence import Expected
from xquant_gguf.evaluate import load, log_probabilities
from xquant_gguf.llama import Llama

SYSTEM = "<|im_start|>system\nYou are a patient librarian who knows every word of hacker slang.<|im_end|>\n"
BEFORE, AFTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
ANSWER = 24  # tokens
FRESH_EVERY = 3  # turns


def resident() -> float:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@dataclass
class Session:
    """One cache, and the tokens it holds."""

    llm: Llama
    tokens: list[int] = field(default_factory=list)

    def feed(self, prompt: Sequence[int]) -> tuple[NDArray[np.float32], int]:
        """Log-probabilities behind a prompt, of which the common beginning is kept, and how much that was."""
        n = next((i for i, (a, b) in enumerate(zip(self.tokens, prompt, strict=False)) if a != b), len(self.tokens))
        n = min(n, len(prompt) - 1)
        self.llm.session.remove(0, n)
        for first in range(n, len(prompt), self.llm.n_batch):
            out = log_probabilities(self.llm, list(prompt[first : first + self.llm.n_batch]), first)
        self.tokens = list(prompt)
        return out[-1], n

    def more(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Log-probabilities [token][vocabulary] behind tokens that follow."""
        out = log_probabilities(self.llm, list(tokens), len(self.tokens))
        self.tokens += tokens
        return out

    def drop(self, first: int, end: int) -> None:
        """Removes tokens and moves those behind them up."""
        self.llm.session.remove(0, first, end)
        self.llm.session.shift(0, end, -1, first - end)
        del self.tokens[first:end]


@dataclass
class Turn:
    """A prompt; dropped: the tokens to be shifted away first; shifts: how often that was done in this chat."""

    prompt: list[int]
    shifts: int
    dropped: tuple[int, int] | None
    answer: list[int] = field(default_factory=list)


@dataclass
class Measured:
    """KL divergence from F16 (mean over the answer), and that of a fresh cache (nan: not measured); MiB resident."""

    kld: float
    fresh: float
    mib: float
    length: int
    kept: int
    sealed: int
    shifts: int


def chats(llm: Llama, text: str, rng: np.random.Generator, n_ctx: int) -> Iterator[Turn]:
    """Turns, one by one; whoever takes them fills in the answer."""
    system, before, after = (llm.tokenize(s.encode(), add_bos=False, special=True) for s in (SYSTEM, BEFORE, AFTER))
    words = llm.tokenize(text.encode(), add_bos=False)
    turns: list[list[int]] = []
    shifts, shifting = 0, False
    while True:
        if not turns or rng.random() < 0.04:
            turns, shifts, shifting = [], 0, bool(rng.random() < 0.5)
        elif rng.random() < 0.15:
            turns.pop()
        at = int(rng.integers(0, len(words) - 200))
        message = before + words[at : at + int(rng.integers(20, 160))] + after
        lengths = np.array([len(turn) for turn in turns], int)
        # what is left of the prompt if the first turns are dropped, by how many
        left = len(system) + len(message) + ANSWER + np.append(lengths[::-1].cumsum()[::-1], 0)
        first = int(np.argmax(left <= (n_ctx if left[0] <= n_ctx else n_ctx // 2)))
        dropped = (len(system), len(system) + int(lengths[:first].sum())) if first and shifting else None
        shifts += dropped is not None
        turns = turns[first:]
        turn = Turn(system + [token for told in turns for token in told] + message, shifts, dropped)
        yield turn
        turns.append(message + turn.answer)


def soak(
    model: str, text: str, *, kv_type: str, minutes: float, turns: int, n_ctx: int, n_ubatch: int, n_threads: int
) -> list[Measured]:
    """What every turn gave."""
    common: dict[str, Any] = {"n_ctx": n_ctx, "n_batch": n_ubatch, "n_ubatch": n_ubatch, "verbose": False}
    common.update(n_threads=n_threads, n_threads_batch=n_threads)
    ours, fresh, reference = (Session(load(model, kv, common)) for kv in (kv_type, kv_type, "f16"))
    rng = np.random.default_rng(1)
    start = time.monotonic()
    out: list[Measured] = []
    for turn in chats(ours.llm, text, rng, n_ctx):
        if turn.dropped:
            ours.drop(*turn.dropped)
            reference.drop(*turn.dropped)
        logp, kept = ours.feed(turn.prompt)
        rows = [logp]
        for _ in range(ANSWER):
            turn.answer.append(int(np.argmax(rows[-1] + rng.gumbel(size=len(logp)))))
            rows.append(ours.more(turn.answer[-1:])[0])
        first, _ = reference.feed(turn.prompt)
        expected = np.vstack([first[None], reference.more(turn.answer)])
        by_fresh = np.nan
        # keys and values that came before a shift saw tokens that are gone: nothing else has them
        if turn.shifts == 0 and len(out) % FRESH_EVERY == 0:
            fresh.tokens = []
            first, _ = fresh.feed(turn.prompt)
            by_fresh = kld(expected, np.vstack([first[None], fresh.more(turn.answer)]))
        sealed = int(ours.llm.kv_cache_info()["pages_sealed"])
        by_ours = kld(expected, np.vstack(rows))
        out.append(Measured(by_ours, by_fresh, resident(), len(turn.prompt), kept, sealed, turn.shifts))
        if len(out) % 50 == 0:
            told = f"turn {len(out)}, {(time.monotonic() - start) / 60:.1f} minutes: KLD {mean(out[-50:], 'kld')}"
            print(f"{told}, {out[-1].mib:.1f} MiB", flush=True)
        if (len(out) >= turns) if turns else (time.monotonic() - start > 60 * minutes):
            break
    for session in (ours, fresh, reference):
        session.llm.close()
    return out


def kld(expected: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    return float(Expected(expected).kld(got).mean())


def mean(turns: Sequence[Measured], name: str) -> str:
    """Mean and standard error of a field, or of "aged - fresh"."""
    x = np.array([t.kld - t.fresh if name == "aged - fresh" else getattr(t, name) for t in turns])
    x = x[~np.isnan(x)]
    return f"{x.mean():.4f} ± {x.std() / len(x) ** 0.5:.4f} ({len(x)})" if len(x) else "-"


def report(turns: Sequence[Measured]) -> str:
    """Tables: by fifths of the run, by length in each half of it, and by shifts."""
    fifths = [[turns[j] for j in part] for part in np.array_split(np.arange(len(turns)), min(5, len(turns)))]
    halves = turns[: len(turns) // 2], turns[len(turns) // 2 :]
    by_fifth = [["fifth", "KLD (turns)", "fresh", "aged - fresh", "MiB at the end", "tokens", "kept", "sealed pages"]]
    for i, part in enumerate(fifths):
        plain = (f"{np.mean([getattr(t, name) for t in part]):.0f}" for name in ("length", "kept", "sealed"))
        klds = (mean(part, name) for name in ("kld", "fresh", "aged - fresh"))
        by_fifth.append([str(i + 1), *klds, f"{part[-1].mib:.1f}", *plain])
    step = 512
    by_length = [["tokens", "KLD in the first half", "in the second half"]]
    for first in range(0, max(t.length for t in turns) + 1, step):
        cells = (mean([t for t in half if first <= t.length < first + step], "kld") for half in halves)
        by_length.append([f"{first} to {first + step - 1}", *cells])
    by_shifts = [["shifts", "KLD"]]
    for n in sorted({t.shifts for t in turns}):
        by_shifts.append([str(n), mean([t for t in turns if t.shifts == n and t.length >= step], "kld")])
    return "\n\n".join(table(rows) for rows in (by_fifth, by_length, by_shifts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--kv-type", default="xquant")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--turns", type=int, default=0, help="instead of minutes")
    parser.add_argument("--n-ctx", type=int, default=2048)
    parser.add_argument("--n-ubatch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    turns = soak(
        args.model, args.text.read_text(errors="replace"), kv_type=args.kv_type, minutes=args.minutes,
        turns=args.turns, n_ctx=args.n_ctx, n_ubatch=args.n_ubatch, n_threads=args.threads,
    )  # fmt: skip
    print(report(turns))
    if args.json:
        args.json.write_text(json.dumps([asdict(turn) for turn in turns]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
