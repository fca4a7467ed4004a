"""Options that commands share, and types of options."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

from xquant_gguf.kv_types import LLAMA_TYPES, checked_kv_type
from xquant_gguf.plan import preset_names

Commands = Any  # what argparse's add_subparsers gives
UBATCH = "tokens of a micro-batch (default %(default)s)"


def at_least(low: int) -> Callable[[str], int]:
    """An argparse type: an integer not below low."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,9}", text) or int(text) < low:
            raise argparse.ArgumentTypeError(f"is {text!r}, must be an integer of at least {low}")
        return int(text)

    return parse


def list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: values with commas between them."""

    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = "list"  # what argparse says is invalid
    return parse


def kv_type_of(args: argparse.Namespace) -> str:
    """--kv-type, or what --kv-plan says, or xquant."""
    kv_type = args.kv_type if args.kv_type or args.kv_plan else "xquant"
    return checked_kv_type(kv_type, args.kv_plan, {}) or "xquant"


def threads_of(args: argparse.Namespace) -> dict[str, Any]:
    """--threads as arguments of Llama."""
    return {"n_threads": args.threads, "n_threads_batch": args.threads}


def cache_options(sub: argparse.ArgumentParser) -> None:
    """--kv-type and --kv-plan."""
    sub.add_argument("--kv-type", help=f"one of {kv_types()} (default: the plan's preset, or xquant)")
    sub.add_argument("--kv-plan", help="JSON file with a plan")


def kv_types() -> str:
    """Names that --kv-type takes."""
    return ", ".join((*preset_names(), *LLAMA_TYPES))


def add_command(
    commands: Commands,
    name: str,
    function: Callable[[argparse.Namespace], int],
    text: str,
    *,
    n_ctx: int | None = None,
    optional: bool = False,
) -> argparse.ArgumentParser:
    """A command that runs `function` on a model; optional: it may name none.  n_ctx: default of --n-ctx, if it has."""
    sub: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    sub.set_defaults(function=function)
    sub.add_argument("model", nargs="?" if optional else None, help="GGUF file")
    text = "tokens of the context; 0: those the model was trained with (default %(default)s)"
    if n_ctx is not None:
        sub.add_argument("--n-ctx", type=at_least(0), default=n_ctx, help=text)
    sub.add_argument("--threads", type=at_least(1), default=None, help="CPU threads (default: llama.cpp's)")
    return sub
