"""The command generate."""

from __future__ import annotations

import argparse
import codecs
import sys
import time
from pathlib import Path

from tqdm import tqdm

from xquant_gguf.cli.options import Commands, add_command, at_least, cache_options, kv_type_of, threads_of
from xquant_gguf.cli.text import bytes_table
from xquant_gguf.inspect import inspect_cache
from xquant_gguf.llama import Llama


def run(args: argparse.Namespace) -> int:
    prompt = Path(args.prompt_file).read_text(encoding="utf-8") if args.prompt_file else args.prompt
    kv_type = kv_type_of(args)
    llm = Llama(args.model, kv_type=kv_type, kv_plan=args.kv_plan, n_ctx=args.n_ctx, verbose=False, **threads_of(args))
    tokens = llm.tokenize(prompt.encode(), special=True)
    if not tokens:
        raise ValueError("the prompt is empty: --prompt or --prompt-file must give at least one token")
    if args.max_tokens >= llm.n_ctx():
        raise ValueError(f"--max-tokens is {args.max_tokens}, must be less than the context's {llm.n_ctx()} tokens")
    if len(tokens) + args.max_tokens > llm.n_ctx():
        tokens = tokens[: llm.n_ctx() - args.max_tokens]
        print(f"prompt cut to {len(tokens)} tokens to fit --n-ctx {llm.n_ctx()}", file=sys.stderr)

    start = time.perf_counter()
    with tqdm(total=len(tokens), unit="token", desc="prompt", file=sys.stderr) as bar:
        for i in range(0, len(tokens), llm.n_batch):
            llm.eval(tokens[i : i + llm.n_batch])
            bar.update(len(tokens[i : i + llm.n_batch]))
    prompt_time = time.perf_counter() - start

    text, n = codecs.getincrementaldecoder("utf-8")("replace"), 0
    start = time.perf_counter()
    while n < args.max_tokens:
        token = llm.sample(temp=args.temperature, repeat_penalty=1.1)
        if token == llm.token_eos():
            break
        print(text.decode(llm.detokenize([token])), end="", flush=True)
        llm.eval([token])
        n += 1
    decode_time = time.perf_counter() - start
    print(text.decode(b"", True), flush=True)

    print(f"\nprompt {len(tokens)} tokens, {len(tokens) / prompt_time:.1f} tokens/s; ", end="")
    print(f"decode {n} tokens, {n / max(decode_time, 1e-9):.1f} tokens/s\n")
    preset, n_ubatch = kv_type if llm.is_xquant else "xquant", llm.context_params.n_ubatch
    try:
        found = inspect_cache(args.model, preset, args.kv_plan, n_ctx=llm.n_ctx(), n_ubatch=n_ubatch)
    except ValueError as error:  # a model with another kind of state, run with a cache type of llama.cpp
        print(f"no table of KV bytes: {error}", file=sys.stderr)
    else:
        print(bytes_table(found))
    return 0


def add(commands: Commands) -> None:
    """Declares it."""
    sub = add_command(commands, "generate", run, "continue a prompt; speed and cache size afterwards", n_ctx=4096)
    sub.add_argument("--prompt", default="The history of the computer begins", help="text to continue")
    sub.add_argument("--prompt-file", help="file with the text to continue")
    sub.add_argument("--max-tokens", type=at_least(1), default=128)
    sub.add_argument("--temperature", type=float, default=0.0)
    cache_options(sub)
