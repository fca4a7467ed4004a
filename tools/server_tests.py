"""Run llama.cpp's own tests of llama-server with each type of cache, and compare.

usage: PYTHONPATH=tests python tools/server_tests.py [unit/test_basic.py ...]

The tests come out of the pinned source, into a temporary folder.  They want small models from a hub and get stand-ins
(tests/support/hub.py, server_tests_plugin.py); those that need more of a network are left out and named.  What a test
says of a model's own words and numbers of tokens then does not hold, with any cache.  So that the rest of it is still
seen, a failed assert does not end a test: the outcome of every assert is compared.

Exit status 1 if an assert, an error or a test's end differs between the types.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fetch_model
import llama_source
from support import hub
from xquant_gguf import programs

TESTS = "tools/server/tests"
PARTS = (TESTS, "models/templates", "tools/mtmd/test-1.jpeg")
PLUGIN = "server_tests_plugin"
Results = dict[str, dict[str, Any]]


def unpack(out: Path) -> Path:
    """Copies the tests and what they read out of the pinned source; the folder that they run in."""
    source = llama_source.find(llama_source.read_release())
    top = source
    with tempfile.TemporaryDirectory() as work:
        if source.is_file():
            with tarfile.open(source) as tar:
                names = [f"{tar.getnames()[0].partition('/')[0]}/vendor/llama.cpp/{part}" for part in PARTS]
                wanted = [member for member in tar if any(member.name.startswith(name) for name in names)]
                tar.extractall(work, members=wanted, filter="data")
            (top,) = Path(work).iterdir()
        llama = top / "vendor" / "llama.cpp" if (top / "vendor" / "llama.cpp").exists() else top
        for part in PARTS:
            (out / part).parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-r", llama / part, out / part], check=True)
    return out / TESTS


class SoftAsserts(ast.NodeTransformer):
    """Turns each assert into a call that notes its outcome and goes on.

    No longer than the assert, nearly: a test reads its own file, of which llama-server gives 16 KiB.
    """

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        call = f"__import__({PLUGIN!r}).note({node.lineno}, None)"
        (statement,) = ast.parse(call).body
        assert isinstance(statement, ast.Expr)
        assert isinstance(statement.value, ast.Call)
        statement.value.args[1] = node.test
        return ast.copy_location(statement, node)


def soften(folder: Path) -> None:
    """Lets the tests in a folder go on behind asserts that fail."""
    for file in folder.glob("unit/test_*.py"):
        tree = SoftAsserts().visit(ast.parse(file.read_text()))
        file.write_text(ast.unparse(ast.fix_missing_locations(tree)))


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return int(it.getsockname()[1])


def sealing_server(folder: Path, server: Path) -> Path:
    """llama-server whose XQuant cache seals each page that is full: slots of the tests have two pages, mostly."""
    script = folder / "llama-server"
    script.write_text(f'#!/bin/sh\nexec "{server}" "$@" --override-kv xquant.window=int:0,xquant.pinned=int:0\n')
    script.chmod(0o755)
    return script


def run(folder: Path, kv_type: str, args: argparse.Namespace) -> Results:
    """Runs the tests with a type of cache; what became of each."""
    report = folder / f"{kv_type}.json"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(Path(__file__).resolve().parent), str(folder))),
        "LLAMA_SERVER_BIN_PATH": str(sealing_server(folder, args.server) if kv_type == "xquant" else args.server),
        "LLAMA_CACHE": str(folder / "tmp"),  # where some tests expect it
        "PORT": str(free_port()),
        "XQUANT_TESTS": json.dumps({"kv_type": kv_type, "report": str(report)}),
    }
    command = [str(args.python.absolute()), "-m", "pytest", "-q", "-p", PLUGIN, "-p", "no:cacheprovider"]
    command += ["-m", "not slow", "--tb=short", "-o", "addopts=", *(args.tests or ["unit"])]
    begin = time.monotonic()
    with (args.out / f"server-tests-{kv_type}.log").open("w") as log:
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if not report.exists():
        raise SystemExit(f"server_tests: pytest ended without results: {log.name}")
    results: Results = json.loads(report.read_text())
    count = Counter(result["outcome"] for result in results.values())
    asserts = Counter(held for result in results.values() for held in result["asserts"].values())
    print(
        f"{kv_type:>8}: {count['passed']} passed, {count['failed']} failed, {count['skipped']} left out; "
        f"{asserts[True]} asserts hold, {asserts[False]} do not; {time.monotonic() - begin:.0f} s",
        flush=True,
    )
    return results


def differences(results: dict[str, Results]) -> list[str]:
    """What is not the same with all types of cache: a line each."""
    (first, reference), *others = results.items()
    lines = []
    for kv_type, result in others:
        for test in sorted({*reference, *result}):
            a, b = reference.get(test), result.get(test)
            if a is None or b is None:
                lines.append(f"{test}: run only with {first if b is None else kv_type}")
                continue
            for line in sorted({*a["asserts"], *b["asserts"]}):
                held = [x["asserts"].get(line, "not reached") for x in (a, b)]
                if held[0] != held[1]:
                    lines.append(f"{test}: {line}: {first}: {held[0]}, {kv_type}: {held[1]}")
            if a["error"] != b["error"]:
                lines.append(f"{test}: {first}: {a['error']}, {kv_type}: {b['error']}")
    return lines


def left_out(results: Results) -> list[str]:
    """Which tests did not run, and why: a line for each reason."""
    tests: dict[str, list[str]] = {}
    for name, result in results.items():
        if result["outcome"] == "skipped":
            tests.setdefault(result["error"], []).append(name.removeprefix("unit/").partition("[")[0])
    lines = []
    for reason, names in sorted(tests.items(), key=lambda entry: -len(entry[1])):
        lines.append(f"  {len(names)}: {reason}: {', '.join(sorted(set(names)))}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tests", nargs="*", help="as pytest takes them, from tools/server/tests: unit/test_basic.py")
    parser.add_argument("--python", type=Path, default=sys.executable, help="with the packages that the tests import")
    parser.add_argument("--model", type=Path, help="a GGUF file that generates text (default: SmolLM2-135M, fetched)")
    parser.add_argument("--layers", type=int, default=4, help="so many of its layers are used (default: 4)")
    parser.add_argument("--kv-types", nargs="+", default=["f16", "xquant"], help="the first one is compared with")
    parser.add_argument("--out", type=Path, default=Path("build"), help="folder for logs and results")
    args = parser.parse_args(argv)
    args.server = programs.path("llama-server").resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        folder = unpack(Path(work))
        soften(folder)
        hub.write(folder / "tmp", args.model or fetch_model.fetch(), args.layers)
        results = {kv_type: run(folder, kv_type, args) for kv_type in args.kv_types}
    (args.out / "server-tests.json").write_text(json.dumps(results, indent=1))
    print("\n".join(["left out:", *left_out(results[args.kv_types[0]])]))
    if len(results) == 1:
        return 0
    found = differences(results)
    print("\n".join(["differences:", *found]) if found else "no differences")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
