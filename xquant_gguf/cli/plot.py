"""The command plot."""

from __future__ import annotations

import argparse

from xquant_gguf.cli.options import Commands
from xquant_gguf.plot import plot

TEXT = "draw KL divergence against bits (of evaluate), and sensitivity by layer (of calibrate), as PNG"


def run(args: argparse.Namespace) -> int:
    plot(args.results, args.out)
    return 0


def add(commands: Commands) -> None:
    """Declares it."""
    sub = commands.add_parser("plot", help=TEXT, description=TEXT)
    sub.set_defaults(function=run)
    sub.add_argument("results", nargs="+", help="JSON files of evaluate --text or calibrate --json")
    sub.add_argument("--out", required=True, metavar="FILE.png", help="picture to write")
