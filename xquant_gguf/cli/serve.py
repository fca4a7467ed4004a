"""The command serve."""

from __future__ import annotations

import argparse

from xquant_gguf.cli.options import Commands

TEXT = "OpenAI-compatible server; options as python -m llama_cpp.server, --kv-type and --kv-plan"


def run(args: argparse.Namespace) -> int:
    try:
        from xquant_gguf.serve import serve
    except ModuleNotFoundError as error:
        raise ValueError(f"serve needs {error.name}, which is not there: pip install 'xquant-gguf[server]'") from error
    return serve(args.options)


def add(commands: Commands) -> None:
    """Declares it; its own options are those of llama_cpp's server, which is an extra: serve parses them."""
    sub = commands.add_parser("serve", help=TEXT, add_help=False)
    sub.set_defaults(function=run, takes_options=True)
