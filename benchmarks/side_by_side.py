"""KL divergence of other caches' recipes beside ours: the same text, the same exact tokens, true bits.

usage: side_by_side.py MODEL --text FILE [--tokens 8192] [--n-ctx 4096] [--threads 1] [--json FILE]
                       [--kv-types xquant,xquant-small,xquant-tiny]
                       [--recipes q4_0,kvarn2,kvarn3,kvarn4,kvarn4-2,turbo2,turbo3,turbo4,turbo4-2]

The protocol is that of `xquant-gguf evaluate`: windows of 4,096 tokens, micro-batches of 512 that read what earlier
ones stored, positions from 512 on scored against the F16 cache.  kv-types run as they are; they may be llama.cpp's own
as well, which then have neither a window nor a pinned page.  The recipes are simulated (benchmarks/recipes.py, which
says what each is and leaves open): an F16 cache, in which pages of 128 tokens are replaced, behind each micro-batch,
by what the recipe gives back of them.  They are the pages that ours has sealed by then: the first page and the newest
128 tokens or more stay exact, in F16, where ours has them in 8 bits.

  q4_0             llama.cpp's: keys and values rotated, blocks of 32                      4.5 bits
  kvarnK, kvarnK-V KVarN (arXiv 2606.03458; kvarn2 to kvarn8 of the fork BeeLlama), keys of K bits, values of V or K
  turboK, turboK-V TurboQuant (arXiv 2504.19874; turbo2 to turbo4 of TheTom's fork), likewise; 8: q8_0
  turborK, ...     the same with the paper's random matrix in place of the fork's signs and Hadamard matrix
  exact            nothing is replaced: what the two kernels of attention differ by

Printed are KL divergence (mean, its standard error, 99th and 99.9th percentile), perplexity, how often the likeliest
token is the same, and true bits: all that is stored for a page that is not exact, over its values; codes, scales,
norms and zero points in F16, padding if there is any; exact tokens are not in them, for recipes as for our types.
--json writes what `xquant-gguf plot` draws, after each window.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from recipes import Blocks, Exact, KVarN, Recipe, TurboQuant
from xquant_gguf import fork
from xquant_gguf.cli.text import table
from xquant_gguf.divergence import Logits
from xquant_gguf.evaluate import Tally, add_window
from xquant_gguf.inspect import CacheInfo
from xquant_gguf.kv_types import LLAMA_TYPES, number_of
from xquant_gguf.plan import PAGE, Shape
from xquant_gguf.probe import unsealed
from xquant_gguf.session import Model, Session

SKIP, N_UBATCH = 512, 512
KV_TYPES = "xquant,xquant-small,xquant-tiny"
RECIPES = "q4_0,kvarn2,kvarn3,kvarn4,kvarn4-2,turbo2,turbo3,turbo4,turbo4-2"
SIMULATED = "simulated "
FAMILIES = {"kvarn": "KVarN", "turbo": "TurboQuant"}
Layers = list[tuple[int, Shape]]  # by number in the model


def recipe(name: str) -> Recipe:
    """A recipe by its name; ArgumentTypeError if there is none."""
    if name in ("exact", "q4_0"):
        return Exact() if name == "exact" else Blocks(4)
    found = re.fullmatch(r"(kvarn|turbor?)([1-8])(?:-([1-8]))?", name)
    if not found:
        raise argparse.ArgumentTypeError(f"recipe {name!r}: must be exact, q4_0, kvarnK-V, turboK-V or turborK-V")
    k, v = int(found[2]), int(found[3] or found[2])
    return KVarN(k, v) if found[1] == "kvarn" else TurboQuant(k, v, random=found[1] == "turbor")


def recipes(names: str) -> dict[str, Recipe]:
    """Recipes by their names, with commas between them."""
    return {name: recipe(name) for name in names.split(",") if name}


class Simulated:
    """An F16 cache whose pages are what a recipe gives back of them, as soon as leader's cache has sealed its own.

    leader: a session with a cache of ours, which has decoded the same tokens just before.
    """

    def __init__(self, session: Session, layers: Layers, recipe: Recipe, leader: Session) -> None:
        self._session, self._layers, self._recipe, self._leader = session, layers, recipe, leader
        self._replaced: set[int] = set()

    def clear(self) -> None:
        """Empties the cache."""
        self._session.clear()
        self._replaced = set()

    def answer(self, tokens: Sequence[int], first: int, /) -> Logits:
        """Decodes tokens at positions first, first + 1, ... and gives the logits behind each."""
        logits = self._session.answer(tokens, first)
        sealed = {i for i, page in enumerate(fork.pages(self._leader.ctx)) if page.state == fork.SEALED}
        if new := sorted(sealed - self._replaced):
            self._replace(new)
            self._replaced |= sealed
        return logits

    def _replace(self, pages: list[int]) -> None:
        n_cells = (pages[-1] + 1) * PAGE
        for layer, shape in self._layers:
            for name, width in (("k", shape.d), ("v", shape.e)):
                heads = [fork.read_rows(self._session.ctx, layer, name, h, n_cells, width) for h in range(shape.heads)]
                tiles = np.stack(heads).reshape(shape.heads, -1, PAGE, width)
                stored = tiles[:, pages].reshape(-1, PAGE, width).astype(np.float32)
                tiles[:, pages] = self._recipe.back(stored, name).reshape(shape.heads, len(pages), PAGE, width)
                for h, rows in enumerate(tiles.reshape(shape.heads, n_cells, width)):
                    fork.write_rows(self._session.ctx, layer, name, h, rows)


def true_bits(recipe: Recipe, layers: Layers) -> float:
    """Bits of a value of a page under a recipe, over all layers, keys and values."""
    sides = [(s.heads * width, recipe.bits(width, name)) for _, s in layers for name, width in (("k", s.d), ("v", s.e))]
    return sum(values * bits for values, bits in sides) / sum(values for values, _ in sides)


def row(name: str, tally: Tally, bits: float) -> dict[str, Any]:
    """A result as xquant-gguf evaluate writes it, with its family and the standard error of the mean."""
    kld = np.concatenate(tally.kld)
    error = float(kld.std() / len(kld) ** 0.5)
    plain = name.removeprefix(SIMULATED)
    family = "llama.cpp, nothing exact" if name in LLAMA_TYPES else "xquant"
    if name.startswith(SIMULATED):
        family = SIMULATED + next((full for short, full in FAMILIES.items() if plain.startswith(short)), plain)
    return {"kv_type": plain, "family": family, **tally.result(), "kld_error": error, "true_bits": bits}


def printed(results: Sequence[dict[str, Any]]) -> str:
    """The results as a table."""
    lines = [["cache", "true bits", "KLD", "99 %", "99.9 %", "perplexity", "same token"]]
    for r in results:
        kld = f"{r['kld']:.4f} ({r['kld_error']:.4f})"
        more = [f"{r['kld_p99']:.2f}", f"{r['kld_p999']:.2f}", f"{r['ppl']:.2f}", f"{100 * r['top1']:.1f} %"]
        name = SIMULATED * r["family"].startswith(SIMULATED) + r["kv_type"]
        lines.append([name, f"{r['true_bits']:.2f}", kld, *more])
    return table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--n-ctx", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--kv-types", default=KV_TYPES, help="the first leads: its sealed pages are what is replaced")
    parser.add_argument("--recipes", type=recipes, default=recipes(RECIPES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    kv_types = args.kv_types.split(",")
    if kv_types[0] in LLAMA_TYPES:
        parser.error(f"--kv-types begins with {kv_types[0]}, must begin with a preset of xquant's")
    with Model(args.model) as model, ExitStack() as open_ones:

        def session(kv: str, **more: Any) -> Session:
            found = model.session(
                kv, n_ctx=args.n_ctx, n_ubatch=N_UBATCH, n_threads=args.threads, flash_attn=True, **more
            )
            return open_ones.enter_context(found)

        tokens = model.tokenize(args.text.read_text(errors="replace"))[: args.tokens]
        if len(tokens) < args.tokens:
            parser.error(f"{args.text} has {len(tokens)} tokens, {args.tokens} were asked for")
        shapes, numbers, _ = model.cache_layers
        layers = list(zip(numbers, shapes, strict=True))
        sessions = {kv: session(kv) for kv in ("f16", *kv_types)}
        bits = {kv: CacheInfo(s.ctx, kv, (number_of(kv),) * 2).now()["true_bits"] for kv, s in sessions.items()}
        caches: dict[str, Any] = dict(sessions)
        for name, found in args.recipes.items():
            exact = session("xquant", plan=unsealed(model.cache_plan))
            caches[SIMULATED + name] = Simulated(exact, layers, found, sessions[kv_types[0]])
            bits[SIMULATED + name] = true_bits(found, layers)

        tallies = {name: Tally() for name in caches}
        settings = {"model": Path(args.model).name, "n_ctx": args.n_ctx, "skip": SKIP, "n_ubatch": N_UBATCH}
        with tqdm(total=len(tokens) * len(caches), unit="token", mininterval=60) as bar:
            for first in range(0, len(tokens), args.n_ctx):
                window = tokens[first : first + args.n_ctx]
                add_window(tallies, caches, window, SKIP, N_UBATCH, bar.update)
                results = [row(name, tally, bits[name]) for name, tally in tallies.items() if name != "f16"]
                if args.json:
                    args.json.write_text(json.dumps({"results": results, **settings, "tokens": first + len(window)}))
    print(printed(results))


if __name__ == "__main__":
    main()
