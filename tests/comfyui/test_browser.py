"""ComfyUI's page in a headless Chromium: the examples load, run and play, and nodes come out of the library."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from serving import INFERENCE, Comfy
from wan_pack.demo.comfyui import cache_folder
from wan_pack.demo.example import (
    BATCH,
    IMAGE_TO_VIDEO,
    LIGHTNING,
    TEXT_TO_VIDEO,
    TI2V_5B,
    WORKFLOWS,
    Prompt,
    example,
    node_id,
    video_node,
)
from wan_pack.nodes import DISPLAY_NAMES

PLAYWRIGHT = "playwright-core@1.65.1"
SCREENSHOTS = Path(__file__).parent / "output"
REQUIRED = "CI_REQUIRE_BROWSER"
CONFIG = "WanVideoDistributedConfig"
IN_A_SUBGRAPH = (IMAGE_TO_VIDEO, TI2V_5B)
"""Examples that run with their inference node in one."""
BYPASSED = 4
"""A node's mode."""


@dataclass(frozen=True)
class Browser:
    """What a visit needs."""

    chromium: str
    node: str
    playwright: Path

    def visit(self, comfy: Comfy, tmp_path: Path, name: str = TEXT_TO_VIDEO, **plan: Any) -> dict[str, Any]:
        """Does what browser.mjs says about `plan` with the example workflow `name`."""
        SCREENSHOTS.mkdir(exist_ok=True)
        plan = {
            "url": comfy.server.url,
            "chromium": self.chromium,
            "playwright": str(self.playwright),
            "workflow": ui_workflow(name),
            "name": name,
            "screenshots": str(SCREENSHOTS),
            **plan,
        }
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        script = Path(__file__).with_name("browser.mjs")
        done = subprocess.run(
            [self.node, str(script), str(tmp_path / "plan.json")], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    node, npm = shutil.which("node"), shutil.which("npm")
    if not (chromium and node and npm):
        absent = [name for name, path in (("chromium", chromium), ("nodejs", node), ("npm", npm)) if not path]
        message = f"{', '.join(absent)} not found; the browser tests need: apt-get install -y chromium nodejs npm"
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(message)
        pytest.skip(message)
    folder = cache_folder() / "browser"
    playwright = folder / "node_modules" / "playwright-core"
    if not playwright.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [npm, "install", "--no-audit", "--no-fund", "--prefix", str(folder), PLAYWRIGHT],
            check=True,
            capture_output=True,
            timeout=300,
        )
    yield Browser(chromium, node, playwright)


@pytest.mark.parametrize(
    ("name", "vue", "inference"),
    [
        # Another seed per renderer, or the second run would come from ComfyUI's cache.
        # And steps enough to be watched.
        (TEXT_TO_VIDEO, False, {"seed": 100, "sample_steps": 30}),
        (TEXT_TO_VIDEO, True, {"seed": 101, "sample_steps": 30}),
        # Presets of 40 and 50 steps take minutes on two cores.
        (IMAGE_TO_VIDEO, False, {"preset": "custom", "sample_steps": 6}),
        (TI2V_5B, True, {"preset": "custom", "sample_steps": 6}),
        (LIGHTNING, False, {}),
        (BATCH, False, {"seed": 200}),
        (BATCH, True, {"seed": 300}),
    ],
    ids=["t2v-canvas", "t2v-nodes2", "i2v-canvas", "ti2v-nodes2", "lightning-canvas", "batch-canvas", "batch-nodes2"],
)
def test_example_loads_runs_and_plays(
    browser: Browser, comfy: Comfy, tmp_path: Path, name: str, vue: bool, inference: dict[str, Any]
) -> None:
    shipped, small = example(name), comfy.example(name, **inference)
    workflow = ui_workflow(name)
    # The picture that a workflow can begin with.
    enable = [node["id"] for node in workflow["nodes"] if node["mode"] == BYPASSED]
    # One on the inference node, one on Save Video. Of a batch the canvas shows all, Nodes 2.0 one after another.
    players = 3 if name == BATCH and not vue else 2
    errors = []
    settings = {
        "values": changes(shipped, small),
        "enable": enable,
        "watch": node_id(shipped, video_node(shipped)),
        "panel": name == TEXT_TO_VIDEO,
        "subgraph": name in IN_A_SUBGRAPH,
    }
    if name == TEXT_TO_VIDEO:
        settings["values"][node_id(shipped, CONFIG)]["keep_warm_seconds"] = 300
    if name in IN_A_SUBGRAPH:
        players = 1
        # ComfyUI's own, when it looks for the node of a text.
        errors = ["Error: Subgraph not found"]
    shown = browser.visit(comfy, tmp_path, name, vue=vue, run=True, players=players, **settings)
    assert shown["missing"] == shown["red"] == shown["shifted"] == shown["dialogs"] == []
    assert [error for error in shown["pageErrors"] if error not in errors] == []
    assert shown["links"] == len(workflow["links"])
    assert api_inputs(shown["api"]) == api_inputs(shipped)
    assert shown["ending"][0] == "execution_success", shown["ending"]
    assert len({player["src"] for player in shown["players"]}) == players, shown["players"]
    for player in shown["players"]:
        assert (player["width"], player["height"], player["error"]) == (224, 128, None), player
        assert player["ready"] == 4 and player["time"] > 0.1, player
    (status,) = comfy.last_outputs()[node_id(shipped, "PreviewAny")]["text"]
    assert ("start_image is 320x200; it was scaled" in status) == (name in (IMAGE_TO_VIDEO, TI2V_5B)), status
    assert ("LoRAs: none" in status) == (name != LIGHTNING), status
    if settings["panel"]:
        check_panel(shown["live"], shown["panel"])
    # As large as --preview-size makes it, in the shape of the video, or of two beside each other.
    sizes = ([512, 293], [512, 144]) if name == BATCH else ([512, 293],)
    assert shown["live"].get("image") in sizes, shown["live"]
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


@pytest.mark.parametrize("name", sorted(path.stem for path in WORKFLOWS.glob("*.json")))
def test_example_has_a_picture_for_the_list(name: str) -> None:
    assert (WORKFLOWS / f"{name}.jpg").read_bytes().startswith(b"\xff\xd8")


def test_a_node_comes_out_of_the_library_and_every_example_is_drawn_whole_in_both_renderers(
    browser: Browser, comfy: Comfy, tmp_path: Path
) -> None:
    workflows = {path.stem: ui_workflow(path.stem) for path in sorted(WORKFLOWS.glob("*.json"))}
    shown = browser.visit(comfy, tmp_path, vue=False, drag=DISPLAY_NAMES[INFERENCE], draw=workflows)
    assert shown["dragged"] == INFERENCE
    assert [(one["name"], one["vue"]) for one in shown["drawn"]] == [
        (n, vue) for vue in (False, True) for n in workflows
    ]
    for one in shown["drawn"]:
        where = (one["name"], one["vue"])
        wrong = {key: one[key] for key in ("missing", "red", "shifted", "dialogs", "overlaps", "cut") if one[key]}
        assert not wrong, (where, wrong)
        assert api_inputs(one["api"]) == api_inputs(example(one["name"])), where


def ui_workflow(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def changes(shipped: Prompt, small: Prompt) -> dict[str, Any]:
    """Node id -> the values in which `small` differs."""
    return {
        key: {name: value for name, value in node["inputs"].items() if value != shipped[key]["inputs"][name]}
        for key, node in small.items()
    }


def api_inputs(prompt: dict[str, Any]) -> dict[str, Any]:
    """Node id -> type and inputs."""
    return {key: (node["class_type"], node["inputs"]) for key, node in prompt.items()}
