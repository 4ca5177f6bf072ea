"""Every link in the documents leads somewhere."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.documents import PAGES, ROOT, anchors, links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert [link for link in links(page) if problem_of(page, link) is not None] == []


def problem_of(page: Path, link: str) -> str | None:
    """Say what is wrong with a link, None if nothing is. Nobody is asked on the internet."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        is_local = parts.hostname in {"127.0.0.1", "localhost"}
        well_formed = bool(parts.hostname) and (parts.scheme == "https" or is_local)
        return None if well_formed else "is no https"
    target = page if not parts.path else (page.parent / unquote(parts.path)).resolve()
    if not target.exists() or not target.is_relative_to(ROOT):
        return "there is no such file"
    if parts.fragment and (target.suffix != ".md" or parts.fragment not in anchors(target)):
        return "there is no such heading"
    return None


@pytest.mark.parametrize(
    ("link", "is_good"),
    [
        ("docs/options.md", True),
        ("docs/options.md#options", True),
        ("docs/options.md#nowhere", False),
        ("#two-commands", True),
        ("docs/nothing.md", False),
        ("https://www.firezone.dev", True),
        ("http://www.firezone.dev", False),
        ("http://127.0.0.1:8080/", True),
        ("../outside.md", False),
    ],
)
def test_what_is_wrong_is_found(link: str, is_good: bool) -> None:
    assert (problem_of(ROOT / "README.md", link) is None) == is_good


def test_readme_can_be_read_in_minutes() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 150
    assert max(map(len, lines)) < 150


def test_the_index_has_every_page() -> None:
    index = ROOT / "docs/README.md"
    listed = {(index.parent / link).resolve() for link in links(index)}
    assert {page for page in PAGES if page.parent == index.parent} - listed == {index}
