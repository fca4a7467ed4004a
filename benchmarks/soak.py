"""A chat that goes on for hours, on an XQuant and on an F16 cache in step: do memory and KL divergence stay flat?

usage: soak.py MODEL --text FILE [--minutes 60 | --turns N] [--kv-type xquant] [--n-ctx 2048] [--json FILE]

A turn is a message from the text and an answer that is sampled from the XQuant cache.  As llama_cpp's generate does,
the longest common beginning of the last prompt and of this one is kept and the rest is cut off.  Chats start anew now
and then with the same system message, a last message is asked again in other words, and when the context is full the
oldest turns are dropped.  The F16 cache is given the same tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xquant_gguf.evaluate import load, log_probabilities
from xquant_gguf.llama import Llama

SYSTEM = "<|im_start|>system\nYou are a patient librarian who knows every word of hacker slang.<|im_end|>\n"
BEFORE, AFTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
ANSWER = 24  # tokens


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
        self.llm._ctx.kv_cache_seq_rm(-1, n, -1)
        for first in range(n, len(prompt), self.llm.n_batch):
            out = log_probabilities(self.llm, list(prompt[first : first + self.llm.n_batch]), first)
        self.tokens = list(prompt)
        return out[-1], n

    def more(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Log-probabilities [token][vocabulary] behind tokens that follow."""
        out = log_probabilities(self.llm, list(tokens), len(self.tokens))
        self.tokens += tokens
        return out


def chats(llm: Llama, text: str, rng: np.random.Generator, n_ctx: int) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts, one a turn; whoever takes them appends the answer to the list that comes with each."""
    system, before, after = (llm.tokenize(s.encode(), add_bos=False, special=True) for s in (SYSTEM, BEFORE, AFTER))
    words = llm.tokenize(text.encode(), add_bos=False)
    turns: list[list[int]] = []
    while True:
        if rng.random() < 0.08:
            turns = []
        elif turns and rng.random() < 0.15:
            turns.pop()
        at = int(rng.integers(0, len(words) - 200))
        message = before + words[at : at + int(rng.integers(20, 160))] + after
        while len(system) + sum(map(len, turns)) + len(message) + ANSWER > n_ctx:
            turns.pop(0)
        prompt = system + [t for turn in turns for t in turn] + message
        answer: list[int] = []
        yield prompt, answer
        turns.append(message + answer)


def soak(
    model: str, text: str, *, kv_type: str, minutes: float, turns: int, n_ctx: int, n_ubatch: int, n_threads: int
) -> list[dict[str, float]]:
    """One dictionary a turn: kld (mean over the answer), mib (resident), prompt and kept (tokens), pages_sealed."""
    common: dict[str, Any] = {"n_ctx": n_ctx, "n_batch": n_ubatch, "n_ubatch": n_ubatch, "verbose": False}
    common.update(n_threads=n_threads, n_threads_batch=n_threads)
    ours, reference = (Session(load(model, kv, common)) for kv in (kv_type, "f16"))
    rng = np.random.default_rng(1)
    start, out = time.monotonic(), []
    for prompt, answer in chats(ours.llm, text, rng, n_ctx):
        logp, kept = ours.feed(prompt)
        rows = [logp]
        for _ in range(ANSWER):
            answer.append(int(np.argmax(rows[-1] + rng.gumbel(size=len(logp)))))
            rows.append(ours.more(answer[-1:])[0])
        first, _ = reference.feed(prompt)
        expected = np.vstack([first[None], reference.more(answer)])
        kld = np.einsum("ij,ij->i", np.exp(expected), expected - np.vstack(rows), dtype=np.float64)
        sealed = ours.llm.kv_cache_info()["pages_sealed"]
        out.append({"kld": float(kld.mean()), "mib": resident(), "prompt": len(prompt), "kept": kept, "sealed": sealed})
        if len(out) % 50 == 0:
            tell(f"turn {len(out)}, {(time.monotonic() - start) / 60:.1f} minutes", out[-50:])
        if (len(out) >= turns) if turns else (time.monotonic() - start > 60 * minutes):
            break
    for session in (ours, reference):
        session.llm.close()
    return out


def tell(name: str, part: Sequence[dict[str, float]]) -> None:
    kld = np.array([turn["kld"] for turn in part])
    mib, prompt, kept, sealed = (np.mean([turn[key] for turn in part]) for key in ("mib", "prompt", "kept", "sealed"))
    print(
        f"{name}: KLD {kld.mean():.4f} ± {kld.std() / len(kld) ** 0.5:.4f}, {mib:.1f} MiB, "
        f"prompts of {prompt:.0f} tokens, {kept:.0f} of them kept, {sealed:.1f} pages sealed",
        flush=True,
    )


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
    for i, part in enumerate(np.array_split(np.arange(len(turns)), min(5, len(turns)))):
        tell(f"fifth {i + 1}", [turns[j] for j in part])
    if args.json:
        args.json.write_text(json.dumps(turns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
