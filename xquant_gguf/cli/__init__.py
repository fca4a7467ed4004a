"""The command xquant-gguf: generate, inspect, calibrate, strip, evaluate, plot, bench, serve, server, run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from xquant_gguf.cli import bench, calibrate, evaluate, generate, inspect, plot, serve, server, strip
from xquant_gguf.session import DecodeError

COMMANDS = (generate, inspect, calibrate, strip, evaluate, plot, bench, serve, server)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="xquant-gguf", description="XQuant, an ultra-low-bit KV cache for llama.cpp")
    top.set_defaults(takes_options=False)
    commands = top.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    top = parser()
    args, options = top.parse_known_args(argv)
    args.options = options
    if options and not args.takes_options:
        top.error(f"unrecognized arguments: {' '.join(options)}")
    try:
        return int(args.function(args))
    except (ValueError, OSError, ImportError, DecodeError) as error:
        print(f"xquant-gguf: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
