"""What the fork changes in llama.cpp's own files: reads the tables of insertions and applies them.

An insertion is a dictionary of strings:

    name     what it is for; errors call it by this name
    file     the file of llama.cpp
    in       where in the file it must land: a function, by its qualified name (`cache::clear`; overloads are told apart
             by a part of their parameters: `build(attn_kv *)`), `struct x` (also for classes and unions), `enum x`,
             `table x` (a variable and its initializer), or `file`: outside of all these
    and one of
    at       `begin` or `end` of what `in` names
    before   code: new lines before the line on which it begins
    after    code: new lines after the line on which it ends; if it ends with {, after the block that it opens
    instead  code: it alone is replaced, or with a number `times` each of so many
    text     what is inserted, indented as the lines around it; @ggml_type@ stands for the number of our type

The code is the anchor.  It must occur exactly once (or `times`) directly in its place, as whole words; blanks in it
stand for any blanks, and comments do not count.  All anchors are looked up in llama.cpp's own text, so that no
insertion depends on another.  insertions.py holds two lists of them, for the cache and for llama.cpp's front ends;
fixes.py a list of fixes, each with a list of them.
"""

from __future__ import annotations

import importlib.util
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cpp_places
from cpp_places import Place, Scan

TABLES = Path(__file__).resolve().parent.parent / "native" / "llama"
WAYS = ("at", "before", "after", "instead")
IN_FILE = "file"


class Refused(Exception):
    """Insertions that cannot be made; the message names each, its file, its place and why."""


@dataclass(frozen=True)
class Insertion:
    """One entry of a table."""

    table: str
    name: str
    file: str
    place: str
    way: str
    anchor: str  # begin or end, if the way is `at`
    text: str
    times: int = 1

    def __str__(self) -> str:
        return f'{self.table}, "{self.name}"'


@dataclass(frozen=True)
class Fix:
    """A fault of llama.cpp that the fork repairs for every type of cache."""

    name: str
    fault: str
    insertions: tuple[Insertion, ...]


@dataclass(frozen=True)
class Problem:
    """Why an insertion cannot be made: kind is `moved`, `ambiguous` or `lost`."""

    kind: str
    message: str


@dataclass(frozen=True)
class Edit:
    """Characters of a file that a text replaces, and what must be around them afterwards."""

    start: int
    end: int
    text: str
    place: Place | None
    insertion: Insertion


# -- tables


def insertions(ggml_type: int, folder: Path | None = None) -> list[Insertion]:
    """All insertions: for the cache, for the front ends, and the fixes. ggml_type: the number of our type."""
    ours = load((folder or TABLES) / "insertions.py")
    entries: list[dict[str, str]] = [*ours["INSERTIONS"], *ours["FRONT_ENDS"]]
    numbered = [{key: text.replace("@ggml_type@", str(ggml_type)) for key, text in entry.items()} for entry in entries]
    table = [read(entry, "insertions.py") for entry in numbered]
    table += [insertion for fix in fixes(folder) for insertion in fix.insertions]
    names = [insertion.name for insertion in table]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise Refused(f"the tables name more than one insertion {doubled[0]!r}")
    return table


def fixes(folder: Path | None = None) -> list[Fix]:
    """The fixes of llama.cpp."""
    return [
        Fix(fix["name"], fix["fault"], tuple(read(entry, "fixes.py") for entry in fix["insertions"]))
        for fix in load((folder or TABLES) / "fixes.py")["FIXES"]
    ]


def load(path: Path) -> dict[str, Any]:
    """The variables of a Python file."""
    spec = importlib.util.spec_from_file_location(f"table_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


def read(entry: dict[str, str], table: str) -> Insertion:
    """Checks an entry of a table."""
    ways = [way for way in WAYS if way in entry]
    if set(entry) - {"times"} != {"name", "file", "in", "text", *ways} or len(ways) != 1:
        raise Refused(f"{table}: {entry} must have name, file, in, text and one of {', '.join(WAYS)}, and nothing else")
    anchor, text, times = entry[ways[0]].strip(), plain(entry["text"]), int(entry.get("times", "1"))
    insertion = Insertion(table, entry["name"], entry["file"], entry["in"], ways[0], anchor, text, times)
    if times != 1 and insertion.way != "instead":
        raise Refused(f"{insertion}: times is for what stands instead of code")
    if insertion.way == "at" and insertion.anchor not in ("begin", "end"):
        raise Refused(f"{insertion}: at is {insertion.anchor!r}, must be begin or end")
    if insertion.way == "at" and insertion.place == IN_FILE:
        raise Refused(f"{insertion}: a file's begin and end are not known to stay what they are: name an anchor")
    if not insertion.anchor or "//" in insertion.anchor or "/*" in insertion.anchor:
        raise Refused(f"{insertion}: anchor {insertion.anchor!r} must be code without comments")
    return insertion


def plain(text: str) -> str:
    """The lines of a text in a table, without the table's indentation; empty lines at its ends stay, but for one."""
    lines = textwrap.dedent(re.sub(r"\A\n|(?<=\n)[ ]*\Z", "", text))
    return lines if lines.endswith("\n") else f"{lines}\n"


# -- places


def locate(scan: Scan, insertion: Insertion) -> list[Edit] | Problem:
    """The edits of a file that make an insertion, or why there are none."""
    place: Place | None = None
    if insertion.place != IN_FILE:
        places = scan.find(insertion.place)
        if not places:
            return elsewhere(scan, insertion, f"there is no {insertion.place}")
        if len(places) > 1:
            return Problem(
                "ambiguous",
                f"there are {len(places)} {insertion.place}: add a part of the parameters of one, such as "
                f"{places[0]}({places[0].parameters[:40]}",
            )
        place = places[0]
    if insertion.way == "at":
        edit = at_edge(scan, place, insertion)
        return edit if isinstance(edit, Problem) else [edit]
    found = [match for match in anchors(scan, insertion) if scan.owner(match.start()) is place]
    if not found:
        return elsewhere(scan, insertion, f"{insertion.anchor!r} is not in {insertion.place}")
    if len(found) != insertion.times:
        lines = ", ".join(str(line_number(scan.text, match.start())) for match in found)
        times = f"{len(found)} times in {insertion.place} (lines {lines}), not {insertion.times}"
        return Problem("ambiguous", f"{insertion.anchor!r} occurs {times}")
    edits = [beside(scan, place, insertion, match.start(), match.end()) for match in found]
    return next((edit for edit in edits if isinstance(edit, Problem)), None) or [
        e for e in edits if isinstance(e, Edit)
    ]


def anchors(scan: Scan, insertion: Insertion) -> Iterable[re.Match[str]]:
    return cpp_places.anchor_pattern(insertion.anchor).finditer(scan.code)


def elsewhere(scan: Scan, insertion: Insertion, what: str) -> Problem:
    """The problem of an insertion whose place does not hold it: moved, if other places of the file hold its anchor."""
    if insertion.way != "at":
        others = {str(scan.owner(match.start()) or IN_FILE) for match in anchors(scan, insertion)}
        if others:
            return Problem("moved", f"{what}; {insertion.anchor!r} is in {', '.join(sorted(others))}")
    return Problem("lost", what)


def at_edge(scan: Scan, place: Place | None, insertion: Insertion) -> Edit | Problem:
    """The edit at the beginning or the end of a place's body."""
    assert place
    code, body = scan.code, scan.code[place.begin : place.end]
    if insertion.anchor == "begin":
        at = line_end(code, place.begin)
        beside_brace = code[place.begin : at]
    else:
        at = line_start(code, place.end)
        beside_brace = code[at : place.end]
    if "\n" not in body or beside_brace.strip():
        return Problem("lost", f"the body of {insertion.place} does not {insertion.anchor} on a line of its own")
    indentation = indentation_at(code, place.begin) + "    "
    if body.strip():
        indentation = indentation_at(code, place.begin + len(body) - len(body.lstrip()))
    return Edit(at, at, textwrap.indent(insertion.text, indentation), place, insertion)


def beside(scan: Scan, place: Place | None, insertion: Insertion, start: int, end: int) -> Edit | Problem:
    """The edit before, after or instead of an anchor."""
    code, indentation = scan.code, indentation_at(scan.code, start)
    if insertion.way == "instead":
        text = textwrap.indent(insertion.text, indentation).strip()
        return Edit(start, end, text, place, insertion)
    if insertion.way == "before":
        at = line_start(code, start)
    elif insertion.anchor.endswith("{"):
        closing = block_end(code, end)
        at = line_end(code, closing) if closing else -1
    else:
        at = line_end(code, end)
    if insertion.anchor.endswith(":") and insertion.way == "after":  # public:, case x:
        indentation = indentation_at(code, at + len(code[at:]) - len(code[at:].lstrip()))
    if (place and not place.begin <= at <= place.end) or scan.owner(at) is not place:
        return Problem("lost", f"the line {insertion.way} {insertion.anchor!r} is not in {insertion.place} any more")
    return Edit(at, at, textwrap.indent(insertion.text, indentation), place, insertion)


def block_end(code: str, start: int) -> int:
    """Offset behind the } of a block whose contents begin at start; 0 if it has none."""
    depth = 1
    for match in cpp_places.TOKEN.finditer(code, start):
        if match.lastgroup == "sign" and match.group() in "{}":
            depth += 1 if match.group() == "{" else -1
            if depth == 0:
                return match.end()
    return 0


def line_start(text: str, at: int) -> int:
    return text.rfind("\n", 0, at) + 1


def line_end(text: str, at: int) -> int:
    """Offset of the beginning of the next line."""
    end = text.find("\n", at)
    return len(text) if end < 0 else end + 1


def line_number(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def indentation_at(code: str, at: int) -> str:
    """What the line of an offset begins with."""
    line = code[line_start(code, at) :]
    return line[: len(line) - len(line.lstrip(" \t"))]


# -- files


def apply(tree: Path, table: Sequence[Insertion]) -> None:
    """Makes all insertions in a source tree, or none: Refused then says all that is wrong."""
    results: dict[Path, str] = {}
    problems: list[str] = []
    for file in dict.fromkeys(insertion.file for insertion in table):
        wanted = [insertion for insertion in table if insertion.file == file]
        path = tree / file
        if not path.exists():
            problems += [f"{insertion}: {file}: the file does not exist" for insertion in wanted]
            continue
        scan = cpp_places.scan(path.read_text())
        found = [(insertion, locate(scan, insertion)) for insertion in wanted]
        problems += [
            f"{insertion}: {file}: {edits.message}" for insertion, edits in found if isinstance(edits, Problem)
        ]
        if not problems:
            results[path] = edited(
                scan, [edit for _, edits in found if not isinstance(edits, Problem) for edit in edits]
            )
    if problems:
        raise Refused("\n".join(problems))
    for path, text in results.items():
        path.write_text(text)


def edited(scan: Scan, edits: Sequence[Edit]) -> str:
    """A file's text with edits; at one spot, they keep the order of the table."""
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    copied = length = 0
    ordered = sorted(edits, key=lambda edit: edit.start)
    for i, edit in enumerate(ordered):
        if edit.start < copied:
            other = ordered[i - 1].insertion
            raise Refused(f"{edit.insertion} and {other} change the same line of {edit.insertion.file}")
        pieces += [scan.text[copied : edit.start], edit.text]
        length += edit.start - copied + len(edit.text)
        spans.append((length - len(edit.text), length))
        copied = edit.end
    text = "".join(pieces) + scan.text[copied:]
    after = cpp_places.scan(text)
    for edit, (start, end) in zip(ordered, spans, strict=True):
        first = start + len(edit.text) - len(edit.text.lstrip())
        for offset in (first, end - 1):
            owner = after.owner(offset)
            if str(owner or IN_FILE) != str(edit.place or IN_FILE):
                raise Refused(
                    f"{edit.insertion}: {edit.insertion.file}: landed in {owner or IN_FILE}, not in "
                    f"{edit.insertion.place}: its text has unpaired brackets"
                )
    return text
