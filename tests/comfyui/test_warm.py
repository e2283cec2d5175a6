"""Processes that a real ComfyUI keeps warm, and the ways in which it lets them go."""

from __future__ import annotations

import time

from serving import Comfy
from wan_pack.demo.example import Prompt, node_of


def warm_example(comfy: Comfy, seed: int) -> Prompt:
    prompt = comfy.example(seed=seed)
    node_of(prompt, "WanVideoDistributedConfig")["inputs"]["keep_warm_seconds"] = 300
    return prompt


def run(comfy: Comfy, prompt: Prompt) -> float:
    """Seconds that it took."""
    started = time.monotonic()
    done = comfy.run(prompt)
    assert done.ending[0] == "execution_success", done.ending
    return time.monotonic() - started


def test_the_next_video_reuses_the_processes_until_memory_is_freed(comfy: Comfy):
    run(comfy, warm_example(comfy, seed=100))
    processes = comfy.job_processes()
    assert len(processes) == 3, "the agent and two ranks wait"
    comfy.server.request("/free", {})
    assert run(comfy, warm_example(comfy, seed=101)) < 8, "processes and model were there"
    assert comfy.job_processes() == processes
    since = time.monotonic()
    comfy.server.request("/free", {"unload_models": True, "free_memory": True})
    comfy.wait_until_idle()
    assert time.monotonic() - since < 1


def test_other_settings_replace_the_processes_and_a_release_ends_them(comfy: Comfy):
    run(comfy, warm_example(comfy, seed=102))
    before = set(comfy.job_processes())
    prompt = warm_example(comfy, seed=103)
    node_of(prompt, "WanVideoDistributedConfig")["inputs"]["memory_optimization"] = True
    run(comfy, prompt)
    after = set(comfy.job_processes())
    assert len(after) == 3
    assert not before & after
    since = time.monotonic()
    assert comfy.server.request("/wan_distributed/release", {}) == {"released": 1}
    comfy.wait_until_idle()
    assert time.monotonic() - since < 1
    assert comfy.server.request("/wan_distributed/release", {}) == {"released": 0}
