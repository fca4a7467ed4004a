"""The commands server and run: llama.cpp's own programs."""

from __future__ import annotations

import argparse

from xquant_gguf import programs
from xquant_gguf.cli.options import Commands, kv_types

SERVER = "llama.cpp's llama-server with an XQuant cache: several clients at once; options as llama-server"
RUN = "one of llama.cpp's programs of the fork, with the options that follow"
OWN_TYPES = {"-ctk", "--cache-type-k", "-ctv", "--cache-type-v"}
HELP = f"""usage: xquant-gguf server MODEL [--kv-type NAME] [options of llama-server]

Runs llama-server -m MODEL -ctk xquant -ctv xquant with all other options as they are.
  MODEL           GGUF file; left out, the options name it
  --kv-type NAME  one of {kv_types()}
                  (default: XQuant by the plan in MODEL, or else by the preset xquant)
`xquant-gguf server --help` continues with llama-server's own options:
"""


def server(args: argparse.Namespace) -> int:
    """Turns into llama-server."""
    own = argparse.ArgumentParser(prog="xquant-gguf server", add_help=False, allow_abbrev=False)
    own.add_argument("--kv-type")
    mine, options = own.parse_known_args(args.options)
    names = {option.partition("=")[0] for option in options}
    if mine.kv_type is not None and (twice := sorted(names & OWN_TYPES)):
        raise ValueError(f"{twice[0]} is given beside --kv-type {mine.kv_type}: leave one of them out")
    if options and not options[0].startswith("-"):
        options.insert(0, "-m")
    if {"-h", "--help"} & names:
        print(HELP, flush=True)
    if not names & OWN_TYPES:
        options += programs.cache_arguments(mine.kv_type)
    programs.execute("llama-server", options)


def run(args: argparse.Namespace) -> int:
    """Turns into a program."""
    if not args.options or args.options[0] not in programs.PROGRAMS:
        named = repr(args.options[0]) if args.options else "missing"
        raise ValueError(f"run: the program is {named}, must be one of {', '.join(programs.PROGRAMS)}")
    programs.execute(args.options[0], args.options[1:])


def add(commands: Commands) -> None:
    """Declares both; their options are those of the programs."""
    for name, function, text in (("server", server, SERVER), ("run", run, RUN)):
        sub = commands.add_parser(name, help=text, add_help=False, prefix_chars="\0")  # every option is the program's
        sub.set_defaults(function=function, takes_options=True)
