"""ComfyUI's own workflows with its two loaders and with those for N GPUs in their places: the same latents and frames.

All that one layout computes is one prompt, for which its processes start once.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from core_sampling import write_expert
from core_workflow import FRAMES, GRAPHS, HEIGHT, LORA, OURS, THEIRS, WIDTH, Workflow, node, with_lora
from patience import AT_ONCE
from safetensors.torch import load_file, save_file
from serving import Comfy
from soak import MORE_DESCRIPTORS, MORE_THREADS, Soak
from wan_pack.demo.client import Run
from wan_pack.demo.example import Prompt, example, node_id
from wan_pack.demo.tiny_expert import lora
from wan_pack.demo.tiny_model import write_animate_file

LIMIT = 1e-4
FEW = ("euler", "one prompt", "image to video", "known frame", "VACE", "frames")
LAYOUTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "1 rank": ({"gpu_count": 1}, FEW),
    "3 ranks": ({"gpu_count": 3, "use_fsdp": True}, FEW),
    "4 ranks, both": ({"gpu_count": 4, "cfg_parallel": "on"}, FEW),
    "2 ranks, CFG parallel": ({"gpu_count": 2, "cfg_parallel": "on"}, tuple(GRAPHS)),
    "2 ranks, Ulysses": ({"gpu_count": 2, "cfg_parallel": "off"}, FEW),
}
"""The config -> which graphs run in it. Two ranks are the last: the tests after them go on with these."""
SEEDED: dict[str, Callable[[Workflow], str]] = {
    "seed 11": lambda flow: flow.sampled(flow.model("T2V high"), seed=11),
    "seed 12, the other": lambda flow: flow.sampled(flow.model("T2V low"), seed=12),
    "seed 13, LoRA": lambda flow: with_lora(flow, seed=13),
    "seed 14, LoRA": lambda flow: with_lora(flow, strength=-0.4, seed=14),
}
ALL = GRAPHS | SEEDED
SOAKED = (*SEEDED, "two stages", "image to video", "known frame", "VACE", "frames")
pytestmark = pytest.mark.usefixtures("stay_warm")
PROMPTS = int(os.environ.get("SOAK_PROMPTS", "6"))
"""That are queued; `make soak` queues 100."""
CONFIG = {
    "gpu_count": 1, "use_ulysses": True, "use_fsdp": False, "offload_model": False, "master_port": 0,
    "memory_optimization": False, "torch_compile": False, "mixed_precision": "fp32", "keep_warm_seconds": 120,
}  # fmt: skip


@pytest.fixture(scope="module")
def build(comfy: Comfy) -> Callable[..., Workflow]:
    """(loader, config's settings) -> a workflow; the files are there, with text of umT5-xxl's channels."""
    folder = comfy.server.base / "models"
    seeds = {"T2V high": ("T2V", 20), "T2V low": ("T2V", 21), "I2V": ("I2V", 22), "TI2V-5B": ("TI2V-5B", 23)}
    seeds |= {"VACE high": ("VACE", 25), "VACE low": ("VACE", 26), "Fun Control": ("Fun", 27)}
    experts = {name: write_expert(folder / "diffusion_models", kind, seed).name for name, (kind, seed) in seeds.items()}
    save_file(lora(24), folder / "loras" / LORA)
    picture = comfy.picture(WIDTH, HEIGHT, "core.png")
    return lambda loader, **config: Workflow(loader, experts, comfy.model.vae, picture, {**CONFIG, **config})


def run(comfy: Comfy, flow: Workflow, graphs: tuple[str, ...]) -> Run:
    for graph in graphs:
        flow.save(graph, ALL[graph](flow))
    return comfy.run(flow.prompt)


def latents(comfy: Comfy, loader: str, graph: str) -> torch.Tensor:
    """The last that were saved."""
    files = sorted((comfy.server.base / "output" / loader).glob(f"{graph}_*.latent"))
    return load_file(files[-1])["latent_tensor"]


@pytest.fixture(scope="module")
def theirs(comfy: Comfy, build: Callable[..., Workflow]) -> dict[str, torch.Tensor]:
    """Graph -> the latents of ComfyUI's own model, or the frames of its own VAE."""
    ended = run(comfy, build(THEIRS), tuple(ALL))
    assert ended.ending[0] == "execution_success", ended.ending[1].get("exception_message")
    return {graph: latents(comfy, THEIRS, graph) for graph in ALL}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_latents_in_every_layout(
    comfy: Comfy, build: Callable[..., Workflow], theirs: dict[str, torch.Tensor], layout: str
) -> None:
    config, graphs = LAYOUTS[layout]
    ended = run(comfy, build(OURS, **config), graphs)
    assert ended.ending[0] == "execution_success", ended.ending[1].get("exception_message")
    for graph in graphs:
        ours = latents(comfy, OURS, graph)
        assert theirs[graph].std() > 0.1 and (ours - theirs[graph]).abs().max() < LIMIT, graph
    (group,) = comfy.server.request("/wan_distributed/groups")["groups"]
    assert group["state"] == "warm", "one group has computed all"


def at_step(action: Callable[[Run], Any], step: int = 3) -> Callable[[Run, str, dict[str, Any]], None]:
    """Calls `action` once, when ComfyUI's bar says that its sampler is so far."""
    done: list[Run] = []

    def watch(run: Run, kind: str, data: dict[str, Any]) -> None:
        if kind == "progress" and data["value"] >= step and not done:
            done.append(run)
            action(run)

    return watch


def endless(flow: Workflow, seed: int) -> Prompt:
    flow.save("endless", flow.sampled(flow.model("T2V high"), steps=5000, seed=seed))
    return flow.prompt


def check_another(
    comfy: Comfy, build: Callable[..., Workflow], theirs: dict[str, torch.Tensor], graph: str = "euler", **config: Any
) -> None:
    """What is sampled afterwards is right."""
    ended = run(comfy, build(OURS, **config), (graph,))
    assert ended.ending[0] == "execution_success", ended.ending[1].get("exception_message")
    assert (latents(comfy, OURS, graph) - theirs[graph]).abs().max() < LIMIT, graph


TWO = {"gpu_count": 2, "cfg_parallel": "on", "stall_timeout": 60}


def test_a_cancelled_sampling_leaves_its_processes_for_the_next(
    comfy: Comfy, build: Callable[..., Workflow], theirs: dict[str, torch.Tensor]
) -> None:
    check_another(comfy, build, theirs, **TWO)
    processes, pressed = comfy.job_processes(), []

    def press(run: Run) -> None:
        pressed.append(time.monotonic())
        comfy.server.request("/interrupt", {"prompt_id": run.prompt_id})

    ended = comfy.run(endless(build(OURS, **TWO), seed=100), at_step(press))
    assert ended.ending[0] == "execution_interrupted", ended.ending
    assert time.monotonic() - pressed[0] < AT_ONCE
    check_another(comfy, build, theirs, **{**TWO, "stall_timeout": 61})
    assert comfy.job_processes() == processes and len(processes) == 3, "the agent and two ranks"
    assert comfy.job_folders() == []


def test_a_killed_rank_ends_the_sampling_in_its_words(
    comfy: Comfy, build: Callable[..., Workflow], theirs: dict[str, torch.Tensor]
) -> None:
    ended = comfy.run(endless(build(OURS, **TWO), seed=101), at_step(partial(kill, comfy)))
    assert ended.ending[0] == "execution_error"
    assert ended.ending[1]["exception_message"].startswith("rank 1 was killed by SIGKILL"), ended.ending
    comfy.wait_until_idle()
    assert comfy.job_folders() == []
    check_another(comfy, build, theirs, **{**TWO, "stall_timeout": 62})


def test_free_memory_lets_the_processes_go(
    comfy: Comfy, build: Callable[..., Workflow], theirs: dict[str, torch.Tensor]
) -> None:
    check_another(comfy, build, theirs, **{**TWO, "stall_timeout": 63})
    assert len(comfy.job_processes()) == 3
    comfy.server.request("/free", {"unload_models": True, "free_memory": True})
    comfy.wait_until_idle()


def cancel(comfy: Comfy, run: Run) -> None:
    comfy.server.request("/interrupt", {"prompt_id": run.prompt_id})


def kill(comfy: Comfy, _: Run) -> None:
    (job,) = comfy.job_folders()
    os.kill(json.loads((job.parent / "rank1.alive").read_text())["pid"], signal.SIGKILL)


def test_of_queued_prompts_some_with_faults_every_other_one_is_right(
    comfy: Comfy, build: Callable[..., Workflow], theirs: dict[str, torch.Tensor]
) -> None:
    """Models, LoRAs and seeds change from one to the next; behind each that ends early another one waits already."""
    rng, soak = random.Random(3), Soak(comfy)
    check_another(comfy, build, theirs, "seed 11", **{**TWO, "stall_timeout": 99})
    soak.released()
    before, queued, todo = soak.state(), 0, list[str]()

    def good() -> None:
        nonlocal queued
        queued += 1
        config = {"gpu_count": 2, "cfg_parallel": rng.choice(["on", "off"]), "stall_timeout": 100 + queued}
        check_another(comfy, build, theirs, rng.choice(SOAKED), **config)

    with ThreadPoolExecutor(1) as queue:
        while queued < PROMPTS:
            good()
            todo = todo or rng.sample(["cancel", "kill", "kill at rest"], 3)
            fault, behind = todo.pop(), list[Future[None]]()
            queued += 1
            if fault == "kill at rest":
                os.kill(rng.choice(comfy.job_processes()), signal.SIGKILL)
                # A job that begins on processes that are dying fails, and says so.
                comfy.wait_until_ended()
                continue

            def act(ended: Run, fault: str = fault, behind: list[Future[None]] = behind) -> None:
                behind.append(queue.submit(good))
                (cancel if fault == "cancel" else kill)(comfy, ended)

            config = {"gpu_count": 2, "cfg_parallel": "on", "stall_timeout": 100 + queued}
            ended = comfy.run(endless(build(OURS, **config), seed=1000 + queued), at_step(act, rng.randint(1, 30)))
            if fault == "cancel":
                assert ended.ending[0] == "execution_interrupted", ended.ending
            else:
                assert ended.ending[1]["exception_message"].startswith("rank 1 was killed by SIGKILL"), ended.ending
            behind[0].result()
    soak.released()
    after = soak.state()
    assert after["job folders"] == 0 and after["shared memory"] <= before["shared memory"], (before, after)
    assert after["descriptors"] <= before["descriptors"] + MORE_DESCRIPTORS, (before, after)
    assert after["threads"] <= before["threads"] + MORE_THREADS, (before, after)


def test_what_needs_the_inside_is_refused_without_a_process(comfy: Comfy, build: Callable[..., Workflow]) -> None:
    Soak(comfy).released()
    flow = build(OURS)
    scales = {"scale_x": 1.0, "shift_x": 0.0, "scale_y": 1.0, "shift_y": 0.0, "scale_t": 0.5, "shift_t": 0.0}
    flow.save("refused", flow.sampled(flow.model("T2V high", ("ScaleROPE", scales))))
    ended = comfy.run(flow.prompt)
    assert ended.ending[0] == "execution_error"
    assert "rope_options" in ended.ending[1]["exception_message"], ended.ending
    assert comfy.job_processes() == []


SMALL: dict[str, dict[str, Any]] = {
    "WanFirstLastFrameToVideo": {"width": WIDTH, "height": HEIGHT, "length": FRAMES},
    "WanVaceToVideo": {"width": WIDTH, "height": HEIGHT, "length": FRAMES},
    "WanAnimateToVideo": {"width": WIDTH, "height": HEIGHT, "length": FRAMES},
    "RepeatImageBatch": {"amount": FRAMES},
    "KSamplerAdvanced": {"steps": 2},
    "KSampler": {"steps": 2},
    "WanVideoDistributedConfig": {"gpu_count": 2, "mixed_precision": "fp32"},
}
"""Of an example's nodes, for a machine without a GPU."""


@pytest.mark.parametrize(
    "name", ["core_first_last_frame_workflow", "core_vace_to_video_workflow", "core_animate_workflow"]
)
def test_an_example_makes_its_video(comfy: Comfy, name: str) -> None:
    """With the tiny models, whose text encoder is none that ComfyUI loads; nor is there a small vision model."""
    prompt, tiny = example(name), comfy.model.in_place_of()
    if "animate" in name:
        write_animate_file(comfy.server.base / "models")
    for key, one in list(prompt.items()):
        inputs = one["inputs"]
        inputs |= {name: tiny[value] for name, value in inputs.items() if isinstance(value, str) and value in tiny}
        inputs |= SMALL.get(one["class_type"], {})
        if one["class_type"] == "KSamplerAdvanced":
            inputs |= {"end_at_step": 1} if inputs["start_at_step"] == 0 else {"start_at_step": 1}
        if one["class_type"] == "CLIPTextEncode":
            prompt[key] = node("TestCoreConditioning", seed=int(key), tokens=9, channels=64)
        if one["class_type"] == "CLIPVisionEncode":
            prompt[key] = node("TestClipVision", seed=int(key))
        if one["class_type"] in ("CLIPLoader", "CLIPVisionLoader"):
            del prompt[key]
    ended = comfy.run(prompt)
    assert ended.ending[0] == "execution_success", ended.ending[1].get("exception_message")
    (saved,) = comfy.outputs(ended)[node_id(prompt, "SaveVideo")]["images"]
    assert (comfy.server.base / "output" / saved["subfolder"] / saved["filename"]).stat().st_size > 0
    (group,) = comfy.server.request("/wan_distributed/groups")["groups"]
    assert group["state"] == "warm", "of two experts, both in one"
