"""How the example workflows lie on the page."""

from __future__ import annotations

import json
from typing import Any

import pytest
from wan_pack.demo.example import WORKFLOWS

TITLE = 30
"""Pixels above a node."""
STRIP = 40
"""Pixels beneath a node whose files are missing: there the page says so, once for each such node."""


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.json")), ids=lambda path: path.stem)
def test_what_the_page_says_of_missing_files_hides_no_node(path: Any) -> None:
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    for node in nodes:
        room = STRIP if node["properties"].get("models") else 0
        left, top, right, bottom = box(node)
        for other in nodes:
            its_left, its_top, its_right, its_bottom = box(other)
            beside = its_right <= left or right <= its_left
            assert other is node or beside or its_bottom <= top or bottom + room <= its_top, (node["id"], other["id"])


def box(node: dict[str, Any]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom, with its title."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height
