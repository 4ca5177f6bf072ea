"""The project's documents, as a reader of Markdown sees them."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.process import CHECKOUT

ROOT: Final = CHECKOUT
PAGES: Final = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(
        part.startswith(".") or part == "node_modules" for part in path.relative_to(ROOT).parts
    )
)
_PARSER: Final = MarkdownIt("commonmark").enable("table")


class Block(NamedTuple):
    """A block of code, with the comment that stands before it."""

    language: str
    text: str
    mark: str  # of an HTML comment, without its ends; empty if there is none


def links(page: Path) -> Iterator[str]:
    """Yield where the links and pictures of a page lead to."""
    for token in _tokens(page):
        if token.type == "link_open":
            yield str(token.attrs["href"])
        elif token.type == "image":
            yield str(token.attrs["src"])
        elif token.type in {"html_block", "html_inline"}:
            yield from re.findall(r'(?:src|srcset|href)="([^"]+)"', token.content)


def anchors(page: Path) -> set[str]:
    """Return the names by which the headings of a page can be linked to, as forges make them."""
    found: set[str] = set()
    tokens = _PARSER.parse(page.read_text())
    for heading, inline in pairwise(tokens):
        if heading.type == "heading_open":
            text = re.sub(r"[^\w\- ]", "", _text(inline).lower()).replace(" ", "-")
            number = sum(
                each == text or re.fullmatch(rf"{text}-\d+", each) is not None for each in found
            )
            found.add(f"{text}-{number}" if number else text)
    return found


def blocks(page: Path) -> list[Block]:
    """Return the blocks of code of a page."""
    found, mark = [], ""
    for token in _PARSER.parse(page.read_text()):
        if token.type == "fence":
            found.append(Block(token.info.strip(), token.content, mark))
        comment = re.fullmatch(r"<!--(.*?)-->\s*", token.content, re.DOTALL)
        mark = comment[1].strip() if token.type == "html_block" and comment else ""
    return found


def _tokens(page: Path) -> Iterator[Token]:
    for token in _PARSER.parse(page.read_text()):
        yield token
        yield from token.children or ()


def _text(inline: Token) -> str:
    return "".join(token.content for token in inline.children or ())
