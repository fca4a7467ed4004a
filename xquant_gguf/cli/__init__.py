"""The command xquant-gguf: generate, inspect, calibrate, strip, evaluate, plot, bench, serve."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from xquant_gguf.cli import bench, cache, calibrate, evaluate


def run_serve(args: argparse.Namespace) -> int:
    try:
        from xquant_gguf.serve import serve
    except ModuleNotFoundError as error:
        raise ValueError(f"serve needs {error.name}, which is not there: pip install 'xquant-gguf[server]'") from error
    return serve(args.options)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="xquant-gguf", description="XQuant, an ultra-low-bit KV cache for llama.cpp")
    commands = top.add_subparsers(dest="command", required=True)
    for part in (cache, calibrate, evaluate, bench):
        part.add(commands)
    # its own options are those of llama_cpp's server, which is an extra: serve parses them
    text = "OpenAI-compatible server; options as python -m llama_cpp.server, --kv-type and --kv-plan"
    commands.add_parser("serve", help=text, add_help=False).set_defaults(function=run_serve)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    top = parser()
    args, options = top.parse_known_args(argv)
    args.options = options
    if options and args.function is not run_serve:
        top.error(f"unrecognized arguments: {' '.join(options)}")
    try:
        return int(args.function(args))
    except (ValueError, OSError, ImportError) as error:
        print(f"xquant-gguf: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
