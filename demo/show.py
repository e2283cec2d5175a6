"""The demo: a tiny Wan2.2-shaped model through the whole path, from ComfyUI's HTTP API to an mp4.

It writes the model, starts ComfyUI headless with this pack, queues the example workflow with two processes (CPU
processes where there is no GPU), shows the progress, and stops what it started. Its folder is demo/output.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from .client import Run, run_prompt
from .comfyui import Server
from .example import ROOT, Prompt, TinyModel, node_id, node_of, small_example
from .train.trained_files import NAMES, place, trained
from .train.world import FRAMES, HEIGHT, WIDTH

OUTPUT = ROOT / "demo" / "output"
TRAINED = ROOT / "demo" / "model"
"""A models folder, written by demo/train."""
CAPTION = "a yellow star moves right on a black background"


def main() -> int:
    """Returns the exit status: 0 once there is a video."""
    start = time.monotonic()
    base = OUTPUT / "comfyui"
    prompt = _workflow(base / "models")
    print("Starting ComfyUI ...")
    with Server(base, pack=ROOT) as server:
        print(f"ComfyUI answers at {server.url}. Queueing the example workflow on two processes.")
        run = asyncio.run(run_prompt(server.url, prompt, on_event=_Terminal().show))
        kind, data = run.ending
        if kind != "execution_success":
            print(
                f"\nThe run failed: {data.get('exception_message', kind)}\nComfyUI's log: {server.log}", file=sys.stderr
            )
            return 1
        video = _video(server, run, node_id(prompt, "WanVideoDistributedInference"))
    shown = OUTPUT / "demo.mp4"
    shutil.copyfile(video, shown)
    words = node_of(prompt, "WanVideoTextEncode")["inputs"]["positive_prompt"]
    print(f'\nDone in {time.monotonic() - start:.0f} s. "{words}":\n{shown}')
    return 0


def _workflow(models: Path) -> Prompt:
    """The example workflow with the trained model of demo/model, where that is there; otherwise with a random one."""
    if not place(TRAINED, NAMES.low_noise).is_file():
        return small_example(_model(models))
    for path in trained(TRAINED):
        link = models / path.relative_to(TRAINED)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(path)
    prompt = small_example(NAMES, width=WIDTH, height=HEIGHT, num_frames=FRAMES, sample_steps=20)
    node_of(prompt, "WanVideoTextEncode")["inputs"]["positive_prompt"] = CAPTION
    return prompt


def _model(models: Path) -> TinyModel:
    """The tiny model's files, written unless an earlier demo of the same version left them."""
    script = Path(__file__).with_name("tiny_model.py")
    stamp = models / ".written"
    if stamp.is_file() and stamp.stat().st_mtime > script.stat().st_mtime:
        return TinyModel()
    print("Writing a tiny Wan2.2-shaped model: random weights, so the video shows coloured clouds, not a picture.")
    from .tiny_model import write_comfyui_files

    names = write_comfyui_files(models)
    stamp.touch()
    return names


def _video(server: Server, run: Run, node: str) -> Path:
    """The file that the node says it saved."""
    output = server.outputs(run.prompt_id)[node]["video"][0]
    return server.base / "output" / output["subfolder"] / output["filename"]


class _Terminal:
    """Shows a run: on a terminal one line that changes, in a file one line per change."""

    def __init__(self) -> None:
        self._bar = 0
        self._line = ""

    def show(self, run: Run, kind: str, data: dict[str, Any]) -> None:
        if kind == "progress":
            self._bar = 100 * data["value"] // max(data["max"], 1)
        elif kind == "text":
            line = data["text"].splitlines()[0]
            if line == self._line:
                return
            self._line = line
        else:
            return
        text = f"[{self._bar:3}%] {self._line}"
        if sys.stdout.isatty():
            print(f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        elif kind == "text":
            print(text, flush=True)
