"""Hooks of mkdocs.yml: the README is the site's first page, and whatever pages link to outside docs/ comes with them.

Pages are written to be read in the repository: their links are relative paths there.  Here each link becomes the path
on the site.  A line `<!-- head of FILE -->` becomes the comment at the head of a C file, so that nobody copies it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()([^()#\s:]+)(?=[)#])")
HEAD = re.compile(r"<!-- head of (\S+) -->")


def site_path(path: str) -> str:
    """The path on the site of a file of the repository: source/ for what is no page."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path.endswith(".md") else f"source/{path}"


def linked(path: str, text: str) -> Iterator[str]:
    """Files of the repository that a page links to."""
    for target in LINK.findall(text):
        yield os.path.normpath(os.path.join(os.path.dirname(path), target))


def with_links(path: str, text: str) -> str:
    """A page of the repository with the links of the site."""

    def site_link(match: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(path), match[1]))
        return os.path.relpath(site_path(target), os.path.dirname(site_path(path)) or ".")

    return LINK.sub(site_link, text)


def head_of(file: Path) -> str:
    """The comment at the head of a C file; ValueError if there is none."""
    text = file.read_text()
    if not text.startswith("/*"):
        raise ValueError(f"{file} begins with {text[:20]!r}, must begin with a comment")
    return text[: text.index("*/") + 2]


def with_heads(text: str) -> str:
    """A page with the comments that it asks for."""
    return HEAD.sub(lambda match: f"```c\n{head_of(ROOT / match[1])}\n```", text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the README and all that is linked to, from page to page."""
    from mkdocs.structure.files import File

    waiting, known = ["README.md"], set()
    waiting += [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    while waiting:
        path = waiting.pop()
        if path in known or not (ROOT / path).is_file():
            continue
        known.add(path)
        if not path.startswith("docs/"):
            files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            waiting += linked(path, (ROOT / path).read_text())
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page as the site has it."""
    path = os.path.relpath(page.file.abs_src_path or "", ROOT)
    return with_heads(with_links(path, markdown))
