"""Insertions into llama.cpp: each lands where its table says, or is refused with a message that says why."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import pytest

import insert
import list_fixes
import try_llama

FILE = """\
#include "a.h"

enum kinds {
    first,
    COUNT   = 7,
};

static const int table[COUNT] = {
    1,
};

struct cache {
    // size(
    int size() { return 1; }

    void clear();
};

void cache::clear() {
    // size(
    int n = size(1);

    if (n) {
        other();
    }
    done(n);
}

int build(const plain * in) {
    return mha(in);
}

int build(const sliding * in) {
    return mha(in);
}

void one_line() { call(); }
"""


def entry(**fields: str) -> dict[str, str]:
    return {"name": "ours", "file": "a.cpp", "in": "cache::clear", "text": "xq();"} | {
        key.removesuffix("_"): value for key, value in fields.items()
    }


def insertion(**fields: str) -> insert.Insertion:
    return insert.read(entry(**fields), "table.py")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "a.cpp").write_text(FILE)
    return tmp_path


def changed(tree: Path, *table: insert.Insertion) -> str:
    """The lines of FILE that insertions add, with a + and the line before them; and those that they take, with a -."""
    insert.apply(tree, table)
    old, new = FILE.splitlines(), (tree / "a.cpp").read_text().splitlines()
    at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), len(old))
    end = next((i for i, (a, b) in enumerate(zip(old[::-1], new[::-1], strict=False)) if a != b), 0)
    end = min(end, len(old) - at, len(new) - at)
    taken, added = old[at : len(old) - end], new[at : len(new) - end]
    return "\n".join([old[at - 1], *(f"-{line}" for line in taken), *(f"+{line}" for line in added)])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"at": "begin"}, "void cache::clear() {\n+    xq();"),
        ({"at": "end"}, "    done(n);\n+    xq();"),
        ({"before": "int n"}, "    // size(\n+    xq();"),
        ({"after": "int n"}, "    int n = size(1);\n+    xq();"),
        ({"after": "if (n) {"}, "    }\n+    xq();"),
        ({"before": "other"}, "    if (n) {\n+        xq();"),
        ({"instead": "size(1)"}, "    // size(\n-    int n = size(1);\n+    int n = xq();;"),
        (
            {"after": "size(1);", "text": "\n  a {\n    b\n\n  }\n\n  "},
            "    int n = size(1);\n+    a {\n+      b\n+\n+    }\n+",
        ),
        ({"before": "size(1); if (n)"}, "    // size(\n+    xq();"),
        ({"in_": "enum kinds", "at": "end"}, "    COUNT   = 7,\n+    xq();"),
        ({"in_": "enum kinds", "instead": "COUNT", "text": "X,\nY"},
         "    first,\n-    COUNT   = 7,\n+    X,\n+    Y   = 7,"),
        ({"in_": "table table", "at": "begin"}, "static const int table[COUNT] = {\n+    xq();"),
        ({"in_": "struct cache", "after": "clear"}, "    void clear();\n+    xq();"),
        ({"in_": "file", "after": '#include "a.h"'}, '#include "a.h"\n+xq();'),
        (
            {"in_": "build(sliding *)", "instead": "mha", "text": "xq"},
            "int build(const sliding * in) {\n-    return mha(in);\n+    return xq(in);",
        ),
        (
            {"instead": "n", "times": "3", "text": "x"},
            "    // size(\n-    int n = size(1);\n-\n-    if (n) {\n-        other();\n-    }\n-    done(n);"
            "\n+    int x = size(1);\n+\n+    if (x) {\n+        other();\n+    }\n+    done(x);",
        ),
        ({"in_": "one_line", "instead": "call"}, "\n-void one_line() { call(); }\n+void one_line() { xq();(); }"),
    ],
)  # fmt: skip
def test_text_lands_in_its_place_with_its_indentation(tree: Path, fields: dict[str, str], expected: str) -> None:
    assert changed(tree, insertion(**fields)) == expected


def test_insertions_at_one_spot_keep_the_order_of_the_table(tree: Path) -> None:
    table = [insertion(name="a", after="int n", text="a;"), insertion(name="b", at="begin", text="b;")]
    table += [insertion(name="c", after="int n", text="c;")]
    insert.apply(tree, table)
    text = (tree / "a.cpp").read_text()
    assert "{\n    b;\n    // size(\n    int n = size(1);\n    a;\n    c;\n" in text


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"before": "gone()"}, "lost", "'gone()' is not in cache::clear"),
        ({"before": "n"}, "ambiguous", "'n' occurs 3 times in cache::clear (lines 21, 23, 26), not 1"),
        ({"instead": "n", "times": "2"}, "ambiguous", "'n' occurs 3 times in cache::clear (lines 21, 23, 26), not 2"),
        ({"before": "return"}, "moved", "'return' is not in cache::clear; 'return' is in build, cache::size"),
        ({"in_": "struct cache", "before": "return"}, "moved", "is in build, cache::size"),
        ({"in_": "file", "before": "COUNT = 7"}, "moved", "'COUNT = 7' is not in file; 'COUNT = 7' is in enum kinds"),
        ({"in_": "cache::gone", "at": "begin"}, "lost", "there is no cache::gone"),
        ({"in_": "cache::gone", "before": "done"}, "moved", "there is no cache::gone; 'done' is in cache::clear"),
        ({"in_": "struct gone", "at": "begin"}, "lost", "there is no struct gone"),
        ({"in_": "build", "before": "mha"}, "ambiguous", "there are 2 build: add a part of the parameters"),
        ({"in_": "build(const)", "before": "mha"}, "ambiguous", "there are 2 build(const)"),
        ({"in_": "build(gone *)", "before": "mha"}, "moved", "there is no build(gone *)"),
        ({"in_": "one_line", "at": "begin"}, "lost", "the body of one_line does not begin on a line of its own"),
        ({"in_": "one_line", "at": "end"}, "lost", "the body of one_line does not end on a line of its own"),
        ({"in_": "one_line", "before": "call"}, "lost", "the line before 'call' is not in one_line any more"),
        ({"in_": "one_line", "after": "call"}, "lost", "the line after 'call' is not in one_line any more"),
        ({"file": "b.cpp", "at": "begin"}, "", "b.cpp: the file does not exist"),
        ({"at": "begin", "text": "} void f() {"}, "", "landed in f, not in cache::clear: its text has unpaired"),
    ],
)  # fmt: skip
def test_insertion_that_cannot_be_made_is_named(tree: Path, fields: dict[str, str], kind: str, message: str) -> None:
    table = [insertion(name="other", at="begin"), insertion(**fields)]
    with pytest.raises(insert.Refused, match=re.escape(message)) as refused:
        insert.apply(tree, table)
    assert str(refused.value).startswith(f'table.py, "ours": {table[1].file}: ')
    assert (tree / "a.cpp").read_text() == FILE
    if kind:
        assert (try_llama.look(tree, table[1]).kind, try_llama.look(tree, table[0]).kind) == (kind, "holds")


def test_all_that_is_wrong_is_said_at_once(tree: Path) -> None:
    table = [insertion(name="a", before="gone"), insertion(name="b", file="b.cpp", at="end")]
    with pytest.raises(insert.Refused) as refused:
        insert.apply(tree, table)
    assert [line.split(":")[0] for line in str(refused.value).splitlines()] == ['table.py, "a"', 'table.py, "b"']


def test_two_insertions_for_the_same_code_are_refused(tree: Path) -> None:
    table = [insertion(name="a", instead="done(n)"), insertion(name="b", instead="(n);")]
    with pytest.raises(insert.Refused, match=r'"b" and table\.py, "a" change the same line of a\.cpp'):
        insert.apply(tree, table)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (entry(), "one of at, before, after, instead"),
        (entry(at="begin", before="a"), "one of at, before, after, instead"),
        (entry(before="a", fault="b"), "and nothing else"),
        ({key: text for key, text in entry(at="begin").items() if key != "in"}, "must have name, file, in, text"),
        (entry(at="middle"), "at is 'middle', must be begin or end"),
        (entry(in_="file", at="begin"), "name an anchor"),
        (entry(before="a; // b"), "must be code without comments"),
        (entry(before="/* a"), "must be code without comments"),
        (entry(before=" "), "must be code without comments"),
        (entry(before="a", times="2"), "times is for what stands instead of code"),
    ],
)
def test_entry_that_is_no_insertion_is_refused(wrong: dict[str, str], message: str) -> None:
    with pytest.raises(insert.Refused, match=re.escape(message)):
        insert.read(wrong, "table.py")


def test_name_is_given_once(tmp_path: Path) -> None:
    (tmp_path / "insertions.py").write_text(f"INSERTIONS = {[entry(at='begin')]}\nFRONT_ENDS = {[entry(at='end')]}")
    (tmp_path / "fixes.py").write_text("FIXES = []")
    with pytest.raises(insert.Refused, match="more than one insertion 'ours'"):
        insert.insertions(43, tmp_path)


def test_place_that_went_to_another_file_is_found(tree: Path) -> None:
    (tree / "src").mkdir()
    (tree / "src" / "b.cpp").write_text(FILE)
    (tree / "a.cpp").write_text('#include "a.h"\n')
    try_llama.scan_file.cache_clear()
    there = [insertion(at="begin"), insertion(before="gone()"), insertion(in_="gone", at="begin")]
    findings = [try_llama.look(tree, wanted) for wanted in there]
    assert [finding.kind for finding in findings] == ["moved", "moved", "lost"]
    assert "cache::clear is in src/b.cpp, with its anchor" in findings[0].message
    assert "cache::clear is in src/b.cpp, without its anchor" in findings[1].message


# -- the tables, and the real source


def test_every_fix_says_in_a_sentence_what_it_repairs() -> None:
    for fix in insert.fixes():
        assert re.fullmatch(r"[A-Z`].{40,}\.", fix.fault), fix.name
        assert ". " not in fix.fault, fix.name


def test_page_of_fixes_is_current() -> None:
    assert list_fixes.PAGE.read_text() == list_fixes.page(insert.fixes()), "`make fixes` writes it"


def test_anchors_are_short() -> None:
    """Short anchors survive more releases, and little of llama.cpp's text is in our repository."""
    long = [i for i in insert.insertions(43) if len(i.anchor) > 80 or "\n" in i.anchor]
    assert not long


def test_another_release_is_asked_for_its_version_and_its_number_of_types(tmp_path: Path) -> None:
    bindings, header = tmp_path / "llama_cpp" / "__init__.py", tmp_path / "ggml" / "include" / "ggml.h"
    for path in (bindings, header):
        path.parent.mkdir(parents=True)
    assert try_llama.bindings_version(tmp_path) == ""
    bindings.write_text('from .llama import *\n\n__version__ = "1.2.3"\n')
    archive = tmp_path / "llama_cpp_python-1.2.3.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(bindings, "llama_cpp_python-1.2.3/llama_cpp/__init__.py")
    assert try_llama.bindings_version(tmp_path) == try_llama.bindings_version(archive) == "1.2.3"
    header.write_text("enum ggml_type {\n    // GGML_TYPE_COUNT = 1,\n    GGML_TYPE_COUNT   = 44,\n};\n")
    assert try_llama.number_of_types(tmp_path) == 44
    try_llama.scan_file.cache_clear()
    header.write_text("enum ggml_type {\n    GGML_TYPE_COUNT\n};\n")
    with pytest.raises(SystemExit, match="gives GGML_TYPE_COUNT no number"):
        try_llama.number_of_types(tmp_path)


def test_report_counts_what_became_of_the_insertions(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try_llama.scan_file.cache_clear()
    table = [insertion(at="begin"), insertion(before="gone()"), insertion(before="n"), insertion(before="return")]
    try_llama.print_report("release", try_llama.report(tree, table))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'holds      table.py, "ours": a.cpp: cache::clear'
    assert lines[-1] == "release: 4 insertions: 1 hold, 1 moved, 1 ambiguous, 1 lost"
