"""ComfyUI's page in a headless Chromium: the examples load, run and play, and nodes come out of the library."""

from __future__ import annotations

import re
from typing import Any

import pytest
from browsing import Browser, changes, ui_workflow
from serving import HEIGHT, INFERENCE, PICTURE, WIDTH, Comfy
from wan_pack.demo.example import (
    IMAGE_TO_VIDEO,
    LIGHTNING,
    TEXT_TO_VIDEO,
    TI2V_5B,
    WORKFLOWS,
    example,
    node_id,
    video_node,
)
from wan_pack.nodes import DISPLAY_NAMES

CONFIG = "WanVideoDistributedConfig"
IN_A_SUBGRAPH = (IMAGE_TO_VIDEO, TI2V_5B)
"""Examples that run with their inference node in one."""
BYPASSED = 4
"""A node's mode."""
pytestmark = pytest.mark.usefixtures("stay_warm")


@pytest.mark.parametrize(
    ("name", "vue", "inference"),
    [
        # Presets of 40 and 50 steps take minutes on two cores.
        (IMAGE_TO_VIDEO, False, {"preset": "custom", "sample_steps": 6}),
        (TI2V_5B, True, {"preset": "custom", "sample_steps": 6}),
        (LIGHTNING, False, {}),
        # Steps enough to be watched. In Nodes 2.0 test_screen.py runs it. The last one: it lets go of the processes.
        (TEXT_TO_VIDEO, False, {"sample_steps": 30}),
    ],
    ids=["i2v-canvas", "ti2v-nodes2", "lightning-canvas", "t2v-canvas"],
)
def test_example_loads_runs_and_plays(
    browser: Browser, comfy: Comfy, name: str, vue: bool, inference: dict[str, Any]
) -> None:
    shipped, small = example(name), comfy.example(name, **inference)
    workflow = ui_workflow(name)
    # The picture that a workflow can begin with.
    enable = [node["id"] for node in workflow["nodes"] if node["mode"] == BYPASSED]
    players = 1
    errors = []
    settings = {
        "values": changes(shipped, small),
        "enable": enable,
        "watch": node_id(shipped, video_node(shipped)),
        "panel": name == TEXT_TO_VIDEO,
        "subgraph": name in IN_A_SUBGRAPH,
    }
    settings["values"][node_id(shipped, CONFIG)]["keep_warm_seconds"] = 300
    if name in IN_A_SUBGRAPH:
        # ComfyUI's own, when it looks for the node of a text.
        errors = ["Error: Subgraph not found"]
    shown = browser.visit("browser.mjs", comfy, name, vue=vue, run=True, players=players, **settings)
    assert shown["missing"] == shown["red"] == shown["shifted"] == shown["dialogs"] == []
    assert [error for error in shown["pageErrors"] if error not in errors] == []
    assert shown["links"] == len(workflow["links"])
    assert api_inputs(shown["api"]) == api_inputs(shipped)
    assert shown["ending"][0] == "execution_success", shown["ending"]
    assert len({player["src"] for player in shown["players"]}) == players, shown["players"]
    for player in shown["players"]:
        assert (player["width"], player["height"], player["error"]) == (WIDTH, HEIGHT, None), player
        assert player["ready"] == 4 and player["time"] > 0.1, player
    (status,) = comfy.last_outputs()[node_id(shipped, "PreviewAny")]["text"]
    assert ("start_image is 320x200; it was scaled" in status) == (name in (IMAGE_TO_VIDEO, TI2V_5B)), status
    assert ("LoRAs: none" in status) == (name != LIGHTNING), status
    if settings["panel"]:
        check_panel(shown["live"], shown["panel"])
    assert shown["live"].get("image") == PICTURE, shown["live"]
    if name in (TEXT_TO_VIDEO, *IN_A_SUBGRAPH):
        check_live_text(shown["live"])


def check_live_text(live: dict[str, Any]) -> None:
    """Of the node during the run."""
    assert re.match(r"sampling \d+/\d+ - [\d.]+ s/it - ETA", live["line"]), live
    assert re.search(r"2 processes: [\d.-]+ GiB", live["usage"]), live


def check_panel(live: dict[str, Any], panel: dict[str, Any]) -> None:
    """During the run and after it."""
    assert "2 CPU processes" in live["group"], live
    assert "Warm" in panel["shown"] and "left" in panel["shown"] and "rank 1" in panel["shown"], panel
    assert "No GPU is held" in panel["left"], panel


def test_the_page_offers_to_download_what_an_example_lacks(browser: Browser, comfy: Comfy) -> None:
    """The demo's files have names of their own, so that all of the example's are missing."""
    shown = browser.visit("browser.mjs", comfy, vue=False, offer=True)
    (dialog,) = shown["dialogs"]
    workflow = ui_workflow(TEXT_TO_VIDEO)
    models = [model for node in workflow["nodes"] for model in node["properties"].get("models", [])]
    assert len(models) == 4
    assert all(f"{model['directory']} / {model['name']}" in dialog for model in models), dialog


@pytest.mark.parametrize("name", sorted(path.stem for path in WORKFLOWS.glob("*.json")))
def test_example_has_a_picture_for_the_list(name: str) -> None:
    assert (WORKFLOWS / f"{name}.jpg").read_bytes().startswith(b"\xff\xd8")


def test_a_node_comes_out_of_the_library_and_every_example_is_drawn_whole_in_both_renderers(
    browser: Browser, comfy: Comfy
) -> None:
    workflows = {path.stem: ui_workflow(path.stem) for path in sorted(WORKFLOWS.glob("*.json"))}
    shown = browser.visit("browser.mjs", comfy, vue=False, drag=DISPLAY_NAMES[INFERENCE], draw=workflows)
    assert shown["dragged"] == INFERENCE
    assert [(one["name"], one["vue"]) for one in shown["drawn"]] == [
        (n, vue) for vue in (False, True) for n in workflows
    ]
    for one in shown["drawn"]:
        where = (one["name"], one["vue"])
        wrong = {key: one[key] for key in ("missing", "red", "shifted", "dialogs", "overlaps", "cut") if one[key]}
        assert not wrong, (where, wrong)
        assert api_inputs(one["api"]) == api_inputs(example(one["name"])), where


def api_inputs(prompt: dict[str, Any]) -> dict[str, Any]:
    """Node id -> type and inputs."""
    return {key: (node["class_type"], node["inputs"]) for key, node in prompt.items()}
