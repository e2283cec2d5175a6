"""A headless Chromium that visits a running ComfyUI, and the versions of its page."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from patience import COMES_UP
from serving import Comfy
from wan_pack.demo.comfyui import cache_folder
from wan_pack.demo.example import TEXT_TO_VIDEO, WORKFLOWS, Prompt

PLAYWRIGHT = "playwright-core@1.65.1"
OLDEST_PAGE, NEWEST_PAGE = "1.32.9", "1.58.1"
"""Of comfyui-frontend-package. ComfyUI 0.3.75 brings the former along."""
SCRIPTS = Path(__file__).resolve().parents[2] / "comfyui"
SCREENSHOTS = SCRIPTS / "output"
PICTURES = "SCREENSHOTS"
"""Set to 1, the visits leave pictures of what they see there."""
REQUIRED = "CI_REQUIRE_BROWSER"


@dataclass(frozen=True)
class Browser:
    """One Chromium for many visits: a page is loaded once, and each visit opens a workflow in it anew."""

    _visitor: subprocess.Popen[str]

    def visit(self, script: str, comfy: Comfy, name: str = TEXT_TO_VIDEO, **plan: Any) -> dict[str, Any]:
        """Does what `script`, of tests/comfyui, says about `plan` with the example workflow `name`."""
        plan = {
            "script": script,
            "url": comfy.server.url,
            "workflow": ui_workflow(name),
            "name": name,
            "screenshots": str(SCREENSHOTS) if os.environ.get(PICTURES) else None,
            **plan,
        }
        stdin, stdout = self._visitor.stdin, self._visitor.stdout
        assert stdin and stdout
        patience = threading.Timer(300, self._visitor.kill)
        patience.start()
        try:
            print(json.dumps(plan), file=stdin, flush=True)
            line = stdout.readline()
        finally:
            patience.cancel()
        assert line, "the visitor has ended, or was killed as it did not answer"
        answer = json.loads(line)
        assert "failed" not in answer, answer
        return answer


@contextlib.contextmanager
def start_browser() -> Iterator[Browser]:
    """Skips the test, or fails it where it is required, if there is none."""
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
    SCREENSHOTS.mkdir(exist_ok=True)
    command = [node, str(SCRIPTS / "visitor.mjs"), chromium, str(playwright)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as visitor:
        try:
            yield Browser(visitor)
            assert visitor.stdin
            # The visitor ends with its last plan.
            visitor.stdin.close()
            visitor.wait(COMES_UP)
        finally:
            visitor.kill()


def page_folder(version: str = NEWEST_PAGE) -> Path:
    """ComfyUI's page in that version, for --front-end-root; fetched into the cache folder if it is not there yet."""
    folder = cache_folder() / f"page-{version}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        wheel = f"comfyui-frontend-package=={version}"
        subprocess.run([*pip, "--dest", temporary, wheel], check=True, capture_output=True, timeout=300)
        (file,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(file) as archive:
            archive.extractall(temporary)
        os.rename(Path(temporary) / "comfyui_frontend_package" / "static", folder)
    return folder


def ui_workflow(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def changes(shipped: Prompt, small: Prompt) -> dict[str, Any]:
    """Node id -> the values in which `small` differs."""
    return {
        key: {name: value for name, value in node["inputs"].items() if value != shipped[key]["inputs"][name]}
        for key, node in small.items()
    }
