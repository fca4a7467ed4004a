"""Every insertion lands in the function that its table names, in the source of llama.cpp that the fork is made from."""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tree_sitter
import tree_sitter_cpp

import insert
import llama_source


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of llama.cpp that the tables change, as the pinned sdist has them."""
    release = llama_source.read_release()
    source = llama_source.local_copy(release) or llama_source.fetched(release)
    if source is None:
        pytest.skip(
            f"{release.sdist} is not in the user's cache folder, and XQUANT_LLAMA_CPP_SOURCE names no other place"
        )
    folder = tmp_path_factory.mktemp("llama.cpp")
    wanted = {i.file for i in insert.insertions(release.ggml_type)}
    if source.is_dir():
        top = source / "vendor" / "llama.cpp" if (source / "vendor" / "llama.cpp").exists() else source
        contents = {file: (top / file).read_bytes() for file in wanted}
    else:
        with tarfile.open(source) as tar:
            contents = dict(members(tar, wanted))
    for file, content in contents.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    return folder


def members(tar: tarfile.TarFile, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    for member in tar:
        file = member.name.partition("/vendor/llama.cpp/")[2]
        if file in wanted:
            content = tar.extractfile(member)
            assert content
            yield file, content.read()


PARSER = tree_sitter.Parser(tree_sitter.Language(tree_sitter_cpp.language()))
KINDS = {"struct_specifier": "struct", "class_specifier": "struct", "enum_specifier": "enum"}


class Lines:
    """Where the lines of a file are, by another parser than ours: (place, parameters) -> its own lines, counted."""

    def __init__(self, text: str) -> None:
        self.text = text.encode()
        self.lines: dict[tuple[str, str], Counter[str]] = {}
        self.owners = [("file", "")] * (text.count("\n") + 1)
        self.visit(PARSER.parse(self.text).root_node, "")
        for owner, line in zip(self.owners, text.split("\n"), strict=True):
            self.lines.setdefault(owner, Counter())[line.strip()] += 1

    def visit(self, node: tree_sitter.Node, scope: str) -> None:
        name, parameters, body = self.named(node)
        if name and body:
            kind = KINDS.get(node.type, "table" if node.type == "init_declarator" else "")
            owner = (f"{kind} {scope}{name}".strip(), parameters)
            # the line of the { belongs to what is around, the line of the } as well
            for line in range(body.start_point.row + 1, body.end_point.row):
                self.owners[line] = owner
        if not (name and node.type == "function_definition"):
            for child in node.children:
                self.visit(child, f"{scope}{name}::" if name and body and node.type in KINDS else scope)

    def named(self, node: tree_sitter.Node) -> tuple[str, str, tree_sitter.Node | None]:
        if node.type == "function_definition":
            declarator: Any = node.child_by_field_name("declarator")
            while declarator and declarator.type != "function_declarator":
                inner = [child for child in declarator.children if child.type.endswith("declarator")]
                declarator = declarator.child_by_field_name("declarator") or (inner[0] if inner else None)
            if not declarator:
                return "", "", None
            parts = [self.of(declarator.child_by_field_name(field)) for field in ("declarator", "parameters")]
            return parts[0], parts[1], node.child_by_field_name("body")
        if node.type == "init_declarator":
            name = re.search(r"\w+", self.of(node.child_by_field_name("declarator")))
            value = node.child_by_field_name("value")
            return (name.group(), "", value) if name and value and value.type == "initializer_list" else ("", "", None)
        if node.type in KINDS:
            return self.of(node.child_by_field_name("name")), "", node.child_by_field_name("body")
        return "", "", None

    def of(self, node: tree_sitter.Node | None) -> str:
        return self.text[node.start_byte : node.end_byte].decode() if node else ""


def test_every_insertion_lands_in_its_function_of_the_real_source(original: Path, tmp_path: Path) -> None:
    """By tree-sitter's reading of the files before and after: each place gained its insertions' lines, no other did."""
    table = insert.insertions(llama_source.read_release().ggml_type)
    before = {file: (original / file).read_text() for file in {i.file for i in table}}
    for file, text in before.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    insert.apply(tmp_path, table)
    for file, text in before.items():
        old, new = Lines(text).lines, Lines((tmp_path / file).read_text()).lines
        assert set(new) >= set(old), file
        wanted = [i for i in table if i.file == file]
        for place in new:
            here = [i for i in wanted if i.place.partition("(")[0] == place[0] and parameters_hold(i.place, place[1])]
            lines = Counter(line.strip() for i in here if i.way != "instead" for line in i.text.splitlines())
            pieces = [line.strip() for i in here if i.way == "instead" for line in i.text.splitlines()]
            anchors = " ".join(i.anchor for i in here if i.way == "instead")
            gained = new[place] - old.get(place, Counter())
            assert not lines - gained, f"{file}: {place} lacks lines of {[i.name for i in here]}"
            assert all(any(piece in line for line in new[place]) for piece in pieces), f"{file}: {place}"
            others = [line for line in gained - lines if not any(piece in line for piece in pieces)]
            assert not others, f"{file}: {place} has more than its insertions"
            gone = [" ".join(line.split()) for line in old.get(place, Counter()) - new[place]]
            assert all(line in anchors or any(word in line for word in anchors.split()) for line in gone), gone
            wanted = [i for i in wanted if i not in here]
        assert not wanted, f"{file}: no place for {[i.name for i in wanted]}"


def parameters_hold(wanted: str, parameters: str) -> bool:
    """Whether a place's parameters have the part that a table names, blanks aside."""
    part = wanted.partition("(")[2].removesuffix(")")
    words = r"\s*".join(re.escape(word) for word in re.findall(r"\w+|\S", part))
    return not part or bool(re.search(rf"(?<!\w){words}", parameters))


# -- another release
