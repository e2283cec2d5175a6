"""What ComfyUI's pages and saved workflows see of the nodes, held against object_info.json: every name, order, type,
default, range, choice and tooltip. A change that is meant is written there by `make object-info`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from node_inputs import use_model_folders
from wan_pack.nodes import DISPLAY_NAMES, node_classes

SNAPSHOT = Path(__file__).with_name("object_info.json")


def shown(node: Any) -> dict[str, Any]:
    return {
        "display_name": DISPLAY_NAMES[node.__name__],
        "description": node.DESCRIPTION,
        "category": node.CATEGORY,
        "function": node.FUNCTION,
        "output_node": getattr(node, "OUTPUT_NODE", False),
        "search_aliases": getattr(node, "SEARCH_ALIASES", []),
        "inputs": node.INPUT_TYPES(),
        "outputs": node.RETURN_TYPES,
        "output_names": node.RETURN_NAMES,
        "output_tooltips": node.OUTPUT_TOOLTIPS,
        "output_is_list": getattr(node, "OUTPUT_IS_LIST", [False] * len(node.RETURN_TYPES)),
    }


def test_nodes_are_what_the_snapshot_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As text: the order of inputs is that of the values in saved workflows, and 1 is not 1.0."""
    use_model_folders(tmp_path, monkeypatch)
    nodes = {name: shown(node) for name, node in node_classes(frozenset()).items()}
    text = json.dumps(nodes, indent=1, ensure_ascii=False) + "\n"
    if os.environ.get("WRITE_OBJECT_INFO"):
        SNAPSHOT.write_text(text, encoding="utf-8")
    assert text.splitlines() == SNAPSHOT.read_text(encoding="utf-8").splitlines()
