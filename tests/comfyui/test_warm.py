"""Processes that a real ComfyUI keeps warm, and the ways in which it lets them go."""

from __future__ import annotations

import time

from patience import AT_ONCE
from serving import Comfy, kept
from wan_pack.demo.example import Prompt, node_of


def warm_example(comfy: Comfy, seed: int) -> Prompt:
    return kept(comfy.example(seed=seed))


def run(comfy: Comfy, prompt: Prompt) -> None:
    done = comfy.run(prompt)
    assert done.ending[0] == "execution_success", done.ending


def test_the_next_video_reuses_the_processes_until_other_gpus_or_freed_memory(comfy: Comfy):
    run(comfy, warm_example(comfy, seed=100))
    processes = comfy.job_processes()
    assert len(processes) == 3, "the agent and two ranks wait"
    comfy.server.request("/free", {})
    run(comfy, warm_example(comfy, seed=101))
    assert comfy.job_processes() == processes
    other = warm_example(comfy, seed=102)
    config = node_of(other, "WanVideoDistributedConfig")["inputs"]
    config["memory_optimization"] = True
    run(comfy, other)
    assert comfy.job_processes() == processes
    config["gpu_count"] = 1
    run(comfy, other)
    others = comfy.job_processes()
    assert len(others) == 2, "another number of ranks has replaced them"
    assert not set(others) & set(processes)
    since = time.monotonic()
    comfy.server.request("/free", {"unload_models": True, "free_memory": True})
    comfy.wait_until_idle()
    assert time.monotonic() - since < AT_ONCE
    assert comfy.server.request("/wan_distributed/release", {}) == {"released": 0}
