"""What the cache is for: a question about the beginning of a long text, with an F16 cache and with XQuant.

usage: demo.py [MODEL.gguf] [--kv-type xquant] [--n-ctx 8192] [--tokens 1500]

A password stands before the text, which is one of the package's own; the questions stand behind it.  Prints, side by
side, the memory of the cache, the speed of reading and answering, and the answers.  Behind 2,600 tokens the default
model, of 135 million parameters, no longer remembers the password, with either cache; larger models may be given more.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fetch_model
from xquant_gguf import Llama
from xquant_gguf.cli.text import table

NOTE = "The password is marigold. Remember it: marigold is the password."
QUESTIONS = ("What is the password?", "What is the password? Say the word.")
MAX_TOKENS = 24
"""Tokens of an answer."""
TEXT = Path(sys.modules["xquant_gguf"].__file__ or "").parent / "data" / "calibration.txt"


@dataclass
class Told:
    """What one cache gives; times in seconds."""

    kv_type: str
    kv_bytes: int = 0
    prompt_tokens: int = 0
    prompt_time: float = 0.0
    decoded_tokens: int = 0
    decode_time: float = 0.0
    answers: list[str] = field(default_factory=list)


def document(llm: Llama, n_tokens: int) -> str:
    """The text, cut to so many tokens."""
    return llm.detokenize(llm.tokenize(TEXT.read_bytes())[:n_tokens]).decode(errors="ignore")


def ask(model: str, kv_type: str, n_ctx: int, n_tokens: int) -> Told:
    """Puts the questions to a model with this cache; the text is read once, before the first one."""
    threads = len(os.sched_getaffinity(0))
    llm = Llama(model, kv_type=kv_type, n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads, verbose=False)
    told = Told(kv_type, llm.kv_cache_info()["bytes_allocated"])
    talk: list[Any] = [{"role": "user", "content": f"{NOTE}\n\n{document(llm, n_tokens)}"}]
    talk.append({"role": "assistant", "content": "I have read it."})
    for question in QUESTIONS:
        start = time.perf_counter()
        stream = llm.create_chat_completion(
            [*talk, {"role": "user", "content": question}], max_tokens=MAX_TOKENS, temperature=0, stream=True
        )
        arrived, parts = [], []
        for chunk in stream:
            if text := chunk["choices"][0]["delta"].get("content"):
                arrived.append(time.perf_counter())
                parts.append(text)
        if not told.answers:  # later questions find the text in the cache
            told.prompt_time, told.prompt_tokens = arrived[0] - start, llm.n_tokens - len(parts)
        told.decode_time += arrived[-1] - arrived[0]
        told.decoded_tokens += len(parts) - 1
        told.answers.append("".join(parts).strip())
    llm.close()
    return told


def report(f16: Told, other: Told, n_ctx: int) -> str:
    """Both side by side."""

    def row(name: str, a: float, b: float, unit: str, times: str) -> list[str]:
        ratio = a / b if times == "less" else b / a
        return [name, f"{a:.1f} {unit}", f"{b:.1f} {unit}", f"{ratio:.1f} times {times}"]

    def speed(told: Told) -> float:
        return told.decoded_tokens / max(told.decode_time, 1e-9)

    def reading(told: Told) -> float:
        return told.prompt_tokens / max(told.prompt_time, 1e-9)

    rows = [["", f16.kv_type, other.kv_type, ""]]
    rows.append(row(f"cache for {n_ctx} tokens", f16.kv_bytes / 2**20, other.kv_bytes / 2**20, "MiB", "less"))
    rows.append(row("reading the text", reading(f16), reading(other), "tokens/s", "as fast"))
    rows.append(row("answering", speed(f16), speed(other), "tokens/s", "as fast"))
    lines = [table(rows)]
    for question, *answers in zip(QUESTIONS, f16.answers, other.answers, strict=True):
        lines += ["", question]
        lines += [f"  {name:12s} {text}" for name, text in zip((f16.kv_type, other.kv_type), answers, strict=True)]
    same = sum(a == b for a, b in zip(f16.answers, other.answers, strict=True))
    return "\n".join([*lines, "", f"the answers agree to the letter: {same} of {len(QUESTIONS)}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", help="GGUF file of a chat model (default: SmolLM2-135M, fetched)")
    parser.add_argument("--kv-type", default="xquant", help="the type beside f16 (default %(default)s)")
    parser.add_argument("--n-ctx", type=int, default=8192, help="tokens of the context (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=1500, help="tokens of the text (default %(default)s)")
    args = parser.parse_args()
    model = args.model or str(fetch_model.fetch())
    print(f'{Path(model).name} reads "{NOTE}" and then {args.tokens} tokens of other text.', flush=True)
    f16, other = (ask(model, kv_type, args.n_ctx, args.tokens) for kv_type in ("f16", args.kv_type))
    print(f"\n{report(f16, other, args.n_ctx)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
