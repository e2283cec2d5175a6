"""The batch node in a real ComfyUI."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

import imageio_ffmpeg
from patience import AT_ONCE
from serving import INFERENCE, Comfy, saving
from wan_pack.demo.client import Run
from wan_pack.demo.example import BATCH, Prompt, node_id, node_of

KIND = "WanVideoDistributedBatch"


def frames(path: Path) -> bytes:
    """All frames of a video, one after another."""
    reader = imageio_ffmpeg.read_frames(str(path))
    next(reader)
    return b"".join(reader)


def paths(comfy: Comfy, shown: dict[str, Any]) -> list[Path]:
    return [
        comfy.server.base / "output" / entry["subfolder"] / entry["filename"]
        for entry in shown.get("video") or shown["images"]
    ]


def with_single_video(prompt: Prompt) -> Prompt:
    """Beside the batch, its second video by the inference node."""
    batch = node_of(prompt, KIND)["inputs"]
    own = {"prompts", "batch_count", "gpus_per_video"}
    single = {name: value for name, value in batch.items() if name not in own}
    single |= {"prompt": batch["prompts"].splitlines()[1], "config": ["one process", 0]}
    config = node_of(prompt, "WanVideoDistributedConfig")
    # The second node finds processes of the first.
    config["inputs"]["keep_warm_seconds"] = 600
    inputs = {**config["inputs"], "gpu_count": 1}
    return {
        **prompt,
        "one process": {**config, "inputs": inputs},
        "single": {"class_type": INFERENCE, "inputs": {**single, "gpu_count": 1}},
    }


def test_batch_makes_the_videos_of_single_runs(comfy: Comfy) -> None:
    prompt = with_single_video(saving(comfy.example(BATCH)))
    run = comfy.run(prompt)
    assert run.ending[0] == "execution_success", run.ending[1].get("exception_message")
    assert comfy.server.request("/wan_distributed/release", {}) == {"released": 2}
    shown = comfy.outputs(run)
    batch = shown[node_id(prompt, KIND)]
    assert set(batch) == {"video"}
    first, second = paths(comfy, batch)
    (alone,) = paths(comfy, shown["single"])
    assert frames(second) == frames(alone)
    assert frames(first) != frames(alone)
    saved = paths(comfy, shown["save"])
    assert [frames(path) for path in saved] == [frames(first), frames(second)], "a list, in order"
    (status,) = shown[node_id(prompt, "PreviewAny")]["text"]
    assert status.startswith("success\n- 2 videos, 2 at a time, each on 1 CPU process\n\nvideo 1 of 2 (seed 42, A")
    lines = [data["text"] for data in run.of("text") if data["node"] == node_id(prompt, KIND)]
    # One group may find the single video's processes and be done before the other has started: not always at once.
    assert {group for line in lines for group in re.findall(r"; group (\d): ", line)} == {"1", "2"}, lines
    assert re.fullmatch(r"2 of 2 done in \d+ s", lines[-1])


def test_interrupt_ends_all_groups_at_once(comfy: Comfy) -> None:
    pressed: list[float] = []

    def watch(run: Run, kind: str, data: dict[str, Any]) -> None:
        if kind == "text" and len(re.findall(r"sampling [1-9]", data["text"])) == 2 and not pressed:
            pressed.append(time.monotonic())
            threading.Thread(target=comfy.server.request, args=("/interrupt", {"prompt_id": run.prompt_id})).start()

    run = comfy.run(comfy.example(BATCH, sample_steps=1000, num_frames=17, batch_count=2), watch)
    ended = time.monotonic() - pressed[0]
    assert run.ending[0] == "execution_interrupted", run.ending
    assert ended < AT_ONCE, f"{ended:.2f} s"
    comfy.wait_until_idle()
    assert comfy.job_folders() == []
