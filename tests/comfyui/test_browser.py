"""ComfyUI's page in a headless Chromium: the example loads, runs and plays, and nodes come out of the library."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from serving import INFERENCE, Comfy
from wan_pack.demo.comfyui import cache_folder
from wan_pack.demo.example import EXAMPLE, UI_EXAMPLE, small_values
from wan_pack.nodes import DISPLAY_NAMES

PLAYWRIGHT = "playwright-core@1.65.1"
SCREENSHOTS = Path(__file__).parent / "output"
REQUIRED = "CI_REQUIRE_BROWSER"


@dataclass(frozen=True)
class Browser:
    """What a visit needs."""

    chromium: str
    node: str
    playwright: Path

    def visit(self, comfy: Comfy, tmp_path: Path, **plan: Any) -> dict[str, Any]:
        """Does what browser.mjs says about `plan`."""
        SCREENSHOTS.mkdir(exist_ok=True)
        plan = {
            "url": comfy.server.url,
            "chromium": self.chromium,
            "playwright": str(self.playwright),
            "workflow": json.loads(UI_EXAMPLE.read_text(encoding="utf-8")),
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


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes2"])
def test_example_loads_runs_and_plays(browser: Browser, comfy: Comfy, tmp_path: Path, vue: bool) -> None:
    values = small_values(comfy.model)
    # Another seed per renderer, or the second run would come from ComfyUI's cache.
    values[INFERENCE] |= {"sample_steps": 2, "seed": 100 + vue}
    shown = browser.visit(comfy, tmp_path, vue=vue, run=True, values=values)
    assert shown["missing"] == shown["red"] == shown["shifted"] == shown["dialogs"] == shown["pageErrors"] == []
    assert shown["links"] == 6
    assert api_inputs(shown["api"]) == api_inputs(json.loads(EXAMPLE.read_text(encoding="utf-8")))
    assert shown["ending"][0] == "execution_success", shown["ending"]
    # One on the inference node, one on Save Video.
    assert len(shown["players"]) == 2, shown["players"]
    for player in shown["players"]:
        assert (player["width"], player["height"], player["error"]) == (224, 128, None), player
        assert player["ready"] == 4 and player["time"] > 0.1, player


def test_node_can_be_dragged_from_the_library(browser: Browser, comfy: Comfy, tmp_path: Path) -> None:
    shown = browser.visit(comfy, tmp_path, vue=False, drag=DISPLAY_NAMES[INFERENCE])
    assert shown["dragged"] == INFERENCE


def api_inputs(prompt: dict[str, Any]) -> dict[str, Any]:
    """Node id -> type and inputs."""
    return {key: (node["class_type"], node["inputs"]) for key, node in prompt.items()}
