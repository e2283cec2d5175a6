"""The first page: short, in the order of somebody with two GPUs; what it leads to is there."""

from __future__ import annotations

import re

import pytest
from mount import ROOT

PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()


def anchors(text: str) -> set[str]:
    """As the page's address has them, behind #."""
    headings = re.findall(r"(?m)^#+ (.*)$", text)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_first_page_is_short_and_in_order():
    assert len(README.encode()) < 12_000
    headings = re.findall(r"(?m)^## (.*)$", README)
    assert headings[:3] == ["Install", "Models", "First video"] and headings.index("Demo without a GPU") > 3
    # What it does, in one table, before anything else; and two commands to have it.
    before = README.partition("## Install")[0]
    assert "| this pack |" in before and "LightX2V" in before and "official code" in before
    assert len(re.findall(r"(?m)^(cd|git|pip) .*$", README.partition("## Models")[0])) == 2


@pytest.mark.parametrize("word", ["Expert", "Rank", "Ulysses", "CFG parallel", "FSDP", "Offload"])
def test_words_are_explained(word: str):
    assert f"- **{word}" in README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):  # type: ignore[no-untyped-def]
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        name, _, heading = target.partition("#")
        other = page.parent / name if name else page
        assert other.exists(), target
        assert not heading or heading in anchors(other.read_text()), target


def test_every_page_is_led_to():
    text = "".join(page.read_text() for page in PAGES)
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in text] == []
