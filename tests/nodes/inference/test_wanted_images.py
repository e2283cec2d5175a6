"""Frames are made where something takes them, and only there; what is queued is marked, so that the node runs again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from node_inputs import use_model_folders
from wan_pack.nodes.inference.inference import WanVideoDistributedInference
from wan_pack.nodes.inference.wanted_images import MARK, NODE, OUTPUT, images_linked, mark_queued


def queued(**links: Any) -> dict[str, Any]:
    """Two nodes of ours, and others that take the given links."""
    ours = {name: {"class_type": NODE, "inputs": {"seed": 1, "model": ["loader", 0]}} for name in ("1", "2:3")}
    others = {name: {"class_type": "SaveImage", "inputs": {"images": link}} for name, link in links.items()}
    return {"prompt": {"loader": {"class_type": "Loader", "inputs": {}}, **ours, **others}, "client_id": "x"}


def marks(prompt: dict[str, Any]) -> dict[str, Any]:
    return {name: node["inputs"][MARK] for name, node in prompt["prompt"].items() if MARK in node["inputs"]}


def test_the_output_and_the_node_are_what_they_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_model_folders(tmp_path, monkeypatch)
    assert WanVideoDistributedInference.RETURN_NAMES.index("images") == OUTPUT
    assert WanVideoDistributedInference.RETURN_TYPES[OUTPUT] == "IMAGE"
    assert WanVideoDistributedInference.__name__ == NODE
    inputs = WanVideoDistributedInference.INPUT_TYPES()
    assert not any(MARK in inputs[kind] for kind in inputs)


def test_a_node_is_marked_when_and_only_when_its_images_are_linked() -> None:
    prompt = queued(save=["2:3", OUTPUT], video=["1", 3], other=["loader", OUTPUT])
    mark_queued(prompt)
    assert marks(prompt) == {"2:3": True}
    # What was sent once is sent again without the link, as a history's workflow is.
    del prompt["prompt"]["save"]
    mark_queued(prompt)
    assert prompt == queued(video=["1", 3], other=["loader", OUTPUT])


def test_what_claims_the_mark_itself_gets_it_by_its_links_alone() -> None:
    prompt = queued(save=["1", OUTPUT])
    for node in prompt["prompt"].values():
        node["inputs"][MARK] = ["loader", 0]
    mark_queued(prompt)
    assert marks(prompt) == {"1": True, "loader": ["loader", 0], "save": ["loader", 0]}


@pytest.mark.parametrize(
    "junk",
    [
        *(None, 3, "x", [], {}, {"prompt": None}, {"prompt": [1]}, {"prompt": {"1": None, "2": 3}}),
        {"prompt": {"1": {"class_type": NODE}}},
        {"prompt": {"1": {"class_type": NODE, "inputs": []}}},
        {"prompt": {"1": {"inputs": {"a": [[], OUTPUT], "b": ["1"], "c": [1, OUTPUT], "d": ["1", "5"]}}}},
        {"prompt": {"1": {"class_type": [], "inputs": {"a": ["1", "5"]}}}},
    ],
)
def test_any_json_is_left_as_it_is(junk: Any) -> None:
    before = copy.deepcopy(junk)
    mark_queued(junk)
    assert junk == before


class Running:
    """ComfyUI's DYNPROMPT, as far as it is asked."""

    def __init__(self, nodes: dict[str, Any]) -> None:
        self._nodes = nodes

    def all_node_ids(self) -> set[str]:
        return set(self._nodes)

    def get_node(self, name: str) -> Any:
        return self._nodes[name]


def test_a_run_looks_at_its_links_itself() -> None:
    """Of nodes, too, that others have been replaced by, of which what was queued says nothing."""
    running = Running(queued(save=["2:3", OUTPUT])["prompt"])
    assert images_linked(running, "2:3")
    assert not images_linked(running, "1")
    assert not images_linked(None, "1")
