"""What a node says while it runs, when it says so, and how long it says that it took."""

from __future__ import annotations

import re
import time
from itertools import pairwise
from typing import Any

from serving import INFERENCE, Comfy
from wan_pack.demo.client import Run
from wan_pack.demo.example import IMAGE_TO_VIDEO, Prompt, node_id, node_of

COLD = [
    "checking the inputs",
    "looking for the packages that the processes import",
    "starting 2 processes",
    "importing PyTorch",
    "connecting the processes",
    "loading the text encoder",
    "encoding the prompt",
    "encoding the start image",
    "loading",
    "sharing the weights",
    "preparing the live picture",
    "sampling",
    "decoding",
    "writing the video",
    "finishing",
    "saving the video",
    "done in",
]
"""In this order."""
WARM = [
    "checking the inputs",
    "looking for the packages that the processes import",
    "the 2 processes of the last video begin",
    "connecting the processes",
    "loading the text encoder",
    "encoding the prompt",
    "encoding the start image",
    "preparing the live picture",
    "loading",
    "sampling",
    "decoding",
    "writing the video",
    "finishing",
    "saving the video",
    "done in",
]
SEEN = {"checking the inputs", "looking for the packages that the processes import", "starting 2 processes",
        "the 2 processes of the last video begin", "saving the video", "done in"}  # fmt: skip
"""Whatever the models. Of what a rank says, one who looks ten times a second misses what is over sooner."""
LOGGED = ["loading the text encoder", "encoding the prompt", "encoding the start image", "sharing the weights",
          "preparing the live picture"]  # fmt: skip
BESIDE = {"encoding the start image", "loading", "sharing the weights", "preparing the live picture"}
"""Done side by side while weights are read, in no order of their own."""
BARE = {"starting", "encoding", "loading"}
"""A phase that has just begun: no words for a wait."""


def prompt_of(comfy: Comfy) -> Prompt:
    """With everything that a job can begin with encoded in it."""
    prompt = comfy.example(IMAGE_TO_VIDEO, preset="custom", sample_steps=3)
    inference = node_of(prompt, INFERENCE)["inputs"]
    inference.pop("text_embeds")
    inference["prompt"] = "a fox"
    node_of(prompt, "LoadWanVideoModel")["inputs"]["text_encoder"] = comfy.model.text_encoder
    # Without FSDP the ranks share the reading.
    node_of(prompt, "WanVideoDistributedConfig")["inputs"] |= {"keep_warm_seconds": 600, "use_fsdp": False}
    log = {"source": [node_id(prompt, INFERENCE), 1]}
    return {**prompt, "log": {"class_type": "PreviewAny", "inputs": log}}


def test_every_phase_is_said_at_once_and_the_time_is_the_time_that_passed(comfy: Comfy) -> None:
    prompt = prompt_of(comfy)
    try:
        for seed, start, words in ((900, "cold", COLD), (901, "warm", WARM)):
            node_of(prompt, INFERENCE)["inputs"]["seed"] = seed
            told, log = followed(comfy, prompt)
            check(start, words, told)
            logged = [line for line in LOGGED if line in log]
            assert logged == (LOGGED if start == "cold" else [line for line in LOGGED if line in words]), log
    finally:
        comfy.server.request("/wan_distributed/release", {})


def followed(comfy: Comfy, prompt: Prompt) -> tuple[list[tuple[float, str]], str]:
    """Runs it. Returns what the node said, with the seconds from queueing, and the log."""
    node, told = node_id(prompt, INFERENCE), []

    def note(run: Run, kind: str, data: dict[str, Any]) -> None:
        if kind == "text" and data["node"] == node:
            told.append((time.monotonic() - queued, data["text"].splitlines()[0]))

    queued = time.monotonic()
    run = comfy.run(prompt, note)
    assert run.ending[0] == "execution_success", run.ending
    return told, comfy.outputs(run)["log"]["text"][0]


def in_order(words: list[str]) -> list[str]:
    """One for each change, those of what is done side by side as one."""
    placed = ["beside the reading" if word in BESIDE else word for word in words]
    return [word for index, word in enumerate(placed) if index == 0 or word != placed[index - 1]]


def check(start: str, words: list[str], told: list[tuple[float, str]]) -> None:
    """Nothing is said but `words`, in their order, and those that nobody can miss are; no wait has none."""
    said = [next((word for word in words if text.startswith(word)), text) for _, text in told if text not in BARE]
    new = in_order(said)
    assert new == [word for word in in_order(words) if word in new], said
    assert set(new) >= SEEN.intersection(words), told
    first, last = told[0][0], told[-1][0]
    ending = re.match(r"done in (\d+) s", told[-1][1])
    assert ending, told
    reported = int(ending[1])
    waits = [until - since for (since, text), (until, _) in pairwise(told) if text in BARE]
    silent = max([first, *waits])
    print(f"{start}: {silent:.2f} s without words, {reported} s reported, {last:.1f} s passed")
    # Of what this machine took for all of it: a busy one takes long for everything, and now and then for one thing.
    assert silent < max(6.0, last / 2), told
    # Between the two lies what other nodes of the workflow take.
    assert last - first - max(6.0, last / 2) <= reported <= last + 0.5, told
