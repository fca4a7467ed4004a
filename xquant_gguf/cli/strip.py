"""The command strip."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from xquant_gguf.cli.options import Commands, add_command
from xquant_gguf.metadata import Key, copy_with_keys, splits


def copy_model(model: str, output: str, keys: Mapping[str, Key]) -> None:
    """Copies a model with these xquant keys, with a progress bar."""
    size = sum(part.stat().st_size for part in splits(Path(model)))
    with tqdm(total=size, unit="B", unit_scale=True, desc=output, disable=None) as bar:
        copy_with_keys(model, output, keys, bar.update)


def run(args: argparse.Namespace) -> int:
    copy_model(args.model, args.output, {})
    return 0


def add(commands: Commands) -> None:
    """Declares it."""
    sub = add_command(commands, "strip", run, "copy a model without its cache plan")
    sub.add_argument("output", help="the copy to write")
