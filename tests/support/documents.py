"""The Markdown pages of the repository: their links, headings, blocks of code and commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENDS = {"&&", "|", ">", ";", "&"}
"""What ends a command in a line of shell."""
BEFORE = {"sudo", "time", "/usr/bin/time", "-v"}
"""What may stand before one, beside variables."""
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block of code: its language, "" if it names none, and its text."""

    language: str
    text: str


@dataclass(frozen=True)
class Document:
    """A page; path: from the repository's root."""

    path: str
    text: str

    def blocks(self) -> list[Block]:
        return [Block(*found) for found in _FENCE.findall(self.text)]

    def prose(self) -> str:
        """The page without its blocks of code."""
        return _FENCE.sub("", self.text)

    def links(self) -> list[str]:
        """What it links to, other sites left out."""
        without_code = re.sub(r"`[^`\n]*`", "", self.prose())
        return [link for link in _LINK.findall(without_code) if not re.match(r"[a-z]+:", link)]

    def anchors(self) -> set[str]:
        """Names of its headings, as GitHub and mkdocs make them."""
        titles = [re.sub(r"[^\w\s-]", "", title.lower()) for title in _HEADING.findall(self.prose())]
        return {re.sub(r"\s", "-", title) for title in titles}

    def commands(self, program: str) -> Iterator[list[str]]:
        """The arguments of each call of a program in blocks of shell."""
        for block in self.blocks():
            if block.language == "sh":
                yield from calls(block.text, program)

    def inline(self, program: str) -> Iterator[list[str]]:
        """Likewise in the text itself, where options may stand without what a call needs besides."""
        for code in re.findall(r"`([^`\n]+)`", self.prose()):
            if code.count("'") % 2 == 0 and code.count('"') % 2 == 0:
                yield from calls(code, program)


def calls(shell: str, program: str) -> Iterator[list[str]]:
    """Arguments of each call of a program in lines of shell; comments and redirections are left out."""
    for line in shell.replace("\\\n", "").splitlines():
        words = shlex.split(line, comments=True)
        for end, group in groupby(words, lambda word: word in ENDS):
            command = list(group)
            while command and ("=" in command[0] or command[0] in BEFORE):
                del command[0]
            if not end and command and os.path.basename(command[0]) == program:
                yield command[1:]


def document(path: str) -> Document:
    return Document(path, (ROOT / path).read_text())


@cache
def documents() -> tuple[Document, ...]:
    """Every page that git knows, or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    try:
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):  # a source archive
        listed = [*(p.name for p in ROOT.glob("*.md")), *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
    return tuple(document(path) for path in sorted(listed) if (ROOT / path).exists())


def target_of(page: str, link: str) -> tuple[str, str]:
    """File and anchor, "" if there is none, that a link on a page means."""
    path, _, anchor = link.partition("#")
    return (os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page), anchor
