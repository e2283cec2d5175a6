"""A running ComfyUI as the tests see it."""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from patience import AT_ONCE
from PIL import Image
from wan_pack.demo.client import Run, run_prompt
from wan_pack.demo.comfyui import Server
from wan_pack.demo.example import (
    SMALL_VIDEO,
    TEXT_TO_VIDEO,
    Prompt,
    TinyModel,
    node_id,
    node_of,
    small_example,
    video_node,
)

INFERENCE = "WanVideoDistributedInference"
WIDTH, HEIGHT = 96, 64
"""Of the videos, a fifth of the demo's pixels: both are whole tokens of every model."""
PICTURE = [WIDTH // 4, HEIGHT // 4]
"""Of the live picture: a pixel of it for four of the video's."""


@dataclass(frozen=True)
class Comfy:
    """The running server and how tests use it."""

    server: Server
    model: TinyModel

    def example(self, name: str = TEXT_TO_VIDEO, **inference: Any) -> Prompt:
        """An example workflow in small."""
        prompt = small_example(self.model, name, **{"sample_steps": 2, "num_frames": 5, **inference})
        for node in prompt.values():
            # Not a size that a test has chosen, nor one that comes from another node.
            if [node["inputs"].get(key) for key in ("width", "height")] == [
                SMALL_VIDEO["width"],
                SMALL_VIDEO["height"],
            ]:
                node["inputs"] |= {"width": WIDTH, "height": HEIGHT}
        return prompt

    def run(self, prompt: Prompt, on_event: Callable[[Run, str, dict[str, Any]], None] | None = None) -> Run:
        return asyncio.run(run_prompt(self.server.url, prompt, on_event=on_event))

    def outputs(self, run: Run) -> dict[str, Any]:
        """Node id -> what the node shows, from the history."""
        return self.server.outputs(run.prompt_id)

    def picture(self, width: int, height: int, name: str = "picture.png") -> str:
        """Writes a picture into the input folder; its name there."""
        across = np.linspace(0, 255, width)[None, :].repeat(height, 0)
        down = np.linspace(255, 0, height)[:, None].repeat(width, 1)
        disc = 255 * ((across - 128) ** 2 + (down - 128) ** 2 < 70**2)
        folder = self.server.base / "input"
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.stack([across, disc, down], -1).astype(np.uint8)).save(folder / name)
        return name

    def last_outputs(self) -> dict[str, Any]:
        """Node id -> what the node shows, of the last workflow that ran."""
        return list(self.server.request("/history").values())[-1]["outputs"]

    def job_folders(self) -> list[Path]:
        """Of running jobs."""
        return sorted((self.server.base / "temp" / "wan_distributed").glob("*/job.json"))

    def job_processes(self) -> list[int]:
        """Processes of this server's jobs: they have the job's folder on their command line."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(self.server.base / "temp") in command:
                found.append(int(entry.name))
        return found

    def folders(self) -> list[str]:
        """Of jobs and groups."""
        return sorted(path.name for path in (self.server.base / "temp" / "wan_distributed").glob("wan-*"))

    def wait_until_idle(self) -> None:
        """No process of a job is left, and no folder."""
        self._wait_until_none(lambda: [*self.job_processes(), *self.folders()])

    def wait_until_at_rest(self) -> None:
        """No job is left; processes may wait for the next."""
        self._wait_until_none(self.job_folders)

    def wait_until_ended(self) -> None:
        """No process of a job is left: a ComfyUI that was killed leaves its folders to the next one."""
        self._wait_until_none(self.job_processes)

    @staticmethod
    def _wait_until_none(list_left: Callable[[], list[Any]]) -> None:
        deadline = time.monotonic() + AT_ONCE
        while left := list_left():
            assert time.monotonic() < deadline, f"left: {left}"
            time.sleep(0.02)


def kept(prompt: Prompt, **config: Any) -> Prompt:
    """Its processes wait for the next job. `config`: more of the config's values."""
    node_of(prompt, "WanVideoDistributedConfig")["inputs"].update(keep_warm_seconds=300, **config)
    return prompt


def saving(prompt: Prompt) -> Prompt:
    """With ComfyUI's own node behind the video, whose id is "save"."""
    video = [node_id(prompt, video_node(prompt)), 3 if video_node(prompt) == INFERENCE else 0]
    inputs = {"video": video, "filename_prefix": "video/wan_saved", "format": "auto", "codec": "auto"}
    return {**prompt, "save": {"class_type": "SaveVideo", "inputs": inputs}}


def at_first_step(action: Callable[[Run], Any]) -> Callable[[Run, str, dict[str, Any]], None]:
    """Calls `action` once, from another thread, when the first step is reported."""
    done = threading.Event()

    def watch(run: Run, kind: str, data: dict[str, Any]) -> None:
        if kind == "text" and re.match("sampling [1-9]", data["text"]) and not done.is_set():
            done.set()
            threading.Thread(target=action, args=(run,)).start()

    return watch
