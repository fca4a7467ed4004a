"""README and docs/: links lead somewhere, code parses, options exist, and tables say what the code says."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

import docs_site
from support.documents import ROOT, Document, calls, document, documents, target_of
from xquant_gguf import cli
from xquant_gguf.metadata import Provenance, plan_keys
from xquant_gguf.plan import Layer, Plan, Side, ValueMap, preset_names

PAGES = [page.path for page in documents()]
PASSED_ON = {"server", "run", "serve"}  # commands whose other options are another program's

OTHERS = {"--kv-type", "--override-kv", "--split-mode"}  # of server and of llama.cpp's programs


@pytest.fixture(params=PAGES)
def page(request: pytest.FixtureRequest) -> Document:
    return document(request.param)


def broken_links(page: Document) -> list[str]:
    """Links of a page to files or headings that are not there."""
    broken = []
    for link in page.links():
        path, anchor = target_of(page.path, link)
        there = path == page.path or ((ROOT / path).is_file() and not path.startswith(".."))
        if not there or (anchor and anchor not in (page if path == page.path else document(path)).anchors()):
            broken.append(link)
    return broken


def test_the_pages_are_found() -> None:
    assert {"README.md", "docs/usage.md", "docs/speed.md", "native/ARM.md", "CONTRIBUTING.md"} <= set(PAGES)
    assert document("README.md").links()
    assert "native/ARM.md" in [target_of("docs/usage.md", link)[0] for link in document("docs/usage.md").links()]


def test_links_lead_somewhere(page: Document) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_noticed() -> None:
    text = "# One Two\n[a](usage.md) [b](#one-two) [c](none.md) [d](usage.md#none) [e](#none) `[f](code)`\n"
    text += "```text\n[g](block)\n```\n[h](../../etc/passwd) [i](https://example.org/)\n"
    assert broken_links(Document("docs/made-up.md", text)) == ["none.md", "usage.md#none", "#none", "../../etc/passwd"]


def repeated(pages: Sequence[Document]) -> list[str]:
    """Paragraphs and tables of some length that stand there more than once."""
    parts = [part for page in pages for part in re.split(r"\n\s*\n", page.prose()) if len(part) > 160]
    return sorted({part[:60] for part in parts if parts.count(part) > 1})


def test_nothing_is_said_twice() -> None:
    assert repeated(documents()) == []


def test_what_is_said_twice_is_noticed() -> None:
    text = "A long sentence. " * 12
    assert repeated([Document("a.md", f"# A\n\n{text}\n\nB\n"), Document("b.md", f"# C\n\n{text}")]) == [text[:60]]


def test_every_block_names_its_language(page: Document) -> None:
    assert {block.language for block in page.blocks()} <= {"sh", "python", "text", "c", "json"}


def test_python_compiles(page: Document) -> None:
    for block in page.blocks():
        if block.language == "python":
            compile(block.text, page.path, "exec")


# ---- the command line ----


def refusal(arguments: list[str]) -> str:
    """Why xquant-gguf refuses a command line, before anything runs; empty if it takes it."""
    parser = cli.parser()
    try:
        args, rest = parser.parse_known_args(arguments)
    except SystemExit:
        return f"refused: {arguments}"
    return "" if args.takes_options or not rest else f"unknown: {rest}"


def options_of(command: str | None) -> set[str]:
    """The options of a command of xquant-gguf; None: of all of them."""
    (commands,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert command is None or command in commands.choices, f"xquant-gguf has no command {command}"
    wanted = commands.choices.values() if command is None else [commands.choices[command]]
    return {option for sub in wanted for action in sub._actions for option in action.option_strings}


def test_command_lines_parse(page: Document) -> None:
    refused = [reason for arguments in page.commands("xquant-gguf") if (reason := refusal(arguments))]
    assert refused == []


def test_options_in_the_text_exist(page: Document) -> None:
    for command, *rest in filter(None, page.inline("xquant-gguf")):
        if command not in PASSED_ON and command.islower():
            unknown = {word for word in rest if word.startswith("--")} - options_of(command)
            assert not unknown, f"xquant-gguf {command}"


def test_options_that_stand_alone_exist(page: Document) -> None:
    """`--option`, of a command or of a script in benchmarks or tests/support."""
    scripts = "".join(
        file.read_text() for folder in ("benchmarks", "tests/support") for file in ROOT.glob(f"{folder}/*.py")
    )
    for code in re.findall(r"`(--[^`]+)`", page.prose()):
        for option in re.findall(r"(?<!\S)--[a-z-]+", code):
            assert option in options_of(None) | OTHERS or f'"{option}"' in scripts, option


def test_a_wrong_option_is_noticed() -> None:
    (call,) = calls("time xquant-gguf bench MODEL \\\n  --depth 3 --kv-typos f16 > out  # a comment\n", "xquant-gguf")
    assert call == ["bench", "MODEL", "--depth", "3", "--kv-typos", "f16"]
    assert refusal(call)
    assert not refusal(["bench", "MODEL", "--depths", "3"])


def test_scripts_and_their_options_exist(page: Document) -> None:
    """python benchmarks/NAME.py --option: the script, or what it imports its options from, names each."""
    named = [*page.commands("python"), *page.inline("python")]
    for script, *options in (call for call in named if call and call[0].endswith(".py")):
        source = (ROOT / script).read_text()
        for option in (word.partition("=")[0] for word in options if word.startswith("--")):
            assert f'"{option}"' in source, f"{script} has no {option}"


def test_make_targets_exist(page: Document) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    for call in [*page.commands("make"), *page.inline("make")]:
        named = {word for word in call if re.fullmatch(r"[a-z-]+", word)}
        assert named <= targets, f"make {' '.join(call)}"
        assert {word.partition("=")[0] for word in call if "=" in word} <= set(re.findall(r"\$\(([A-Z]+)\)", makefile))


def test_tests_that_are_named_exist(page: Document) -> None:
    for call in [*page.commands("pytest"), *page.inline("pytest")]:
        for word in call:
            if "/" in word:
                assert (ROOT / word).exists(), word


# ---- what the README promises ----


def test_the_readme_is_short() -> None:
    assert len(document("README.md").text.split()) <= 900


def test_ci_runs_the_readmes_test_command() -> None:
    assert ["test"] in list(document("README.md").commands("make"))
    assert ["test"] in list(calls((ROOT / ".ci/run").read_text(), "make"))


def test_the_first_table_is_that_of_the_measurements() -> None:
    """Bits, divergence, speed and memory of SmolLM2 in README are figures of docs/measurements.md."""
    measured = document("docs/measurements.md").text
    rows = [[cell.strip(" *`") for cell in line.strip("|").split("|")] for line in measured.splitlines() if "|" in line]
    quality: dict[str, list[str]] = {}
    memory: dict[str, str] = {}
    speed: dict[str, str] = {}
    for row in rows:
        name = row[0].lower()
        if len(row) == 4 and "%" in row[-1]:
            quality.setdefault(name, [row[1], row[2].split(",")[0]])
        elif row[0] == "MiB":
            header = [cell.lower() for cell in row]
        elif row[0] == "SmolLM2-135M-Instruct":
            memory = dict(zip(header, row, strict=True))
        elif len(row) == 5 and name not in speed and re.match(r"[\d.]+( \(|$)", row[4]):
            speed[name] = row[4].split()[0]
    table = [line for line in document("README.md").text.splitlines() if line.startswith("|")][2:6]
    for line in table:
        name, bits, kld, decode, mib = (cell.strip(" *`") for cell in line.strip("|").split("|"))
        assert [bits, kld] == quality[name]
        assert decode == f"{speed[name]} tokens/s"
        assert mib == f"{memory[name]} MiB"


def test_the_types_are_named() -> None:
    usage = document("docs/usage.md").text
    assert all(f"`{name}`" in usage for name in preset_names())


def test_the_table_of_gguf_keys_is_complete() -> None:
    """Every key that is written is in docs/formats.md, and no other."""
    side = Side(2, 0, source=0)
    maps = {1: ValueMap((0,), bytes(2))}
    plan = Plan(
        "calibrated", (Layer(Side(2, 128), Side(2, 0)), Layer(Side(2, 128), side)), 128, 1, maps, 0.1, 8, {0: b""}
    )
    written = {re.sub(r"(map|transform)\.\d+", r"\1.N", key) for key in plan_keys(plan, [0, 1], 2, Provenance("tool"))}
    section = document("docs/formats.md").text.split("## GGUF keys")[1].split("\n## ")[0]
    named: set[str] = set()
    for cell in re.findall(r"^\| (`xquant.*?) \|", section, re.MULTILINE):
        keys = re.findall(r"`([\w.]+)`", cell)
        stem = keys[0].rpartition(".")[0]
        keys = [key if key.startswith("xquant.") else stem + key for key in keys if key != "v"]
        named |= set(keys)
        if "and `v` alike" in cell:
            named |= {key.replace(".k.", ".v.") for key in keys}
    assert named == written


# ---- the site ----


def test_every_page_is_in_the_sites_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    named = set(re.findall(r"^ +- (?:\w+: )?(\S+\.md)$", config, re.MULTILINE))
    assert named == {docs_site.site_path(path) for path in PAGES if not path.startswith(".")}


def test_links_become_those_of_the_site() -> None:
    text = "[a](../native/include/xquant.h) [b](../CONTRIBUTING.md#x) [c](limits.md) [d](#e) [f](https://g.h/)"
    want = "[a](source/native/include/xquant.h) [b](CONTRIBUTING.md#x) [c](limits.md) [d](#e) [f](https://g.h/)"
    assert docs_site.with_links("docs/page.md", text) == want
    assert docs_site.with_links("README.md", "[a](docs/limits.md#b)") == "[a](limits.md#b)"
    assert docs_site.with_links("native/ARM.md", "[a](../README.md)") == "[a](../index.md)"


def test_heads_of_headers_are_shown() -> None:
    shown = docs_site.with_heads(document("docs/formats.md").text)
    assert "K codes | K parameters | V codes | V parameters" in shown
    assert "header    magic, bytes of a cell's extension" in shown
    assert "<!-- head of" not in shown


def test_a_file_without_a_head_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.h").write_text("int x;\n")
    with pytest.raises(ValueError, match="must begin with a comment"):
        docs_site.head_of(tmp_path / "x.h")
