"""ComfyUI's own workflows with Load Diffusion Model and with the loader for N GPUs in its place: the same latents.

All that one layout computes is one prompt, for which its processes start once.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from core_sampling import TEXT_DIM, write_expert
from safetensors.torch import load_file, save_file
from serving import Comfy
from wan_pack.demo.client import Run
from wan_pack.demo.example import Prompt
from wan_pack.demo.tiny_expert import lora

OURS, THEIRS = "LoadDiffusionModelDistributed", "UNETLoader"
WIDTH, HEIGHT, FRAMES, STEPS = 64, 48, 9, 4
LORA = "core_lora.safetensors"
LIMIT = 1e-4
Link = list[Any]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


class Workflow:
    """A prompt in the making, with one loader."""

    def __init__(self, loader: str, experts: dict[str, str], vae: str, picture: str, config: dict[str, Any]) -> None:
        text = {"tokens": 9, "channels": TEXT_DIM}
        self.loader, self._experts = loader, experts
        self.prompt: Prompt = {
            "config": node("WanVideoDistributedConfig", **config),
            "vae": node("VAELoader", vae_name=vae),
            "picture": node("LoadImage", image=picture),
            "positive": node("TestCoreConditioning", seed=1, **text),
            "negative": node("TestCoreConditioning", seed=2, **text),
            "latent": node("EmptyHunyuanLatentVideo", width=WIDTH, height=HEIGHT, length=FRAMES, batch_size=1),
        }

    def add(self, kind: str, **inputs: Any) -> str:
        name = f"{len(self.prompt)} {kind}"
        self.prompt[name] = node(kind, **inputs)
        return name

    def model(self, expert: str, *nodes: tuple[str, dict[str, Any]]) -> Link:
        """A MODEL; `nodes` are put on it, in order."""
        file = self._experts[expert]
        if self.loader == THEIRS:
            link = [self.add(THEIRS, unet_name=file, weight_dtype="default"), 0]
        else:
            link = [self.add(OURS, unet_name=file, config=["config", 0]), 0]
        for kind, inputs in nodes:
            link = [self.add(kind, model=link, **inputs), 0]
        return link

    def sampled(self, model: Link, sampler: str = "euler", **inputs: Any) -> str:
        """KSampler, of the text alone unless told otherwise."""
        given = {"positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]}
        given |= {"seed": 3, "steps": STEPS, "cfg": 3.0, "scheduler": "simple", "denoise": 1.0, **inputs}
        return self.add("KSampler", model=model, sampler_name=sampler, **given)

    def save(self, graph: str, sampler: str) -> None:
        self.add("SaveLatent", samples=[sampler, 0], filename_prefix=f"{self.loader}/{graph}")


def two_stages(flow: Workflow) -> str:
    shift = ("ModelSamplingSD3", {"shift": 8.0})
    given = {"positive": ["positive", 0], "negative": ["negative", 0], "noise_seed": 3, "steps": STEPS, "cfg": 3.5}
    given |= {"sampler_name": "euler", "scheduler": "simple"}
    first = flow.add(
        "KSamplerAdvanced", **given, model=flow.model("T2V high", shift), latent_image=["latent", 0],
        add_noise="enable", start_at_step=0, end_at_step=STEPS // 2, return_with_leftover_noise="enable",
    )  # fmt: skip
    return flow.add(
        "KSamplerAdvanced", **given, model=flow.model("T2V low", shift), latent_image=[first, 0],
        add_noise="disable", start_at_step=STEPS // 2, end_at_step=10_000, return_with_leftover_noise="disable",
    )  # fmt: skip


def custom(flow: Workflow) -> str:
    model = flow.model("T2V high")
    guider = flow.add("CFGGuider", model=model, positive=["positive", 0], negative=["negative", 0], cfg=3.0)
    sampler = flow.add("KSamplerSelect", sampler_name="dpmpp_2m")
    sigmas = flow.add("BasicScheduler", model=model, scheduler="beta", steps=STEPS, denoise=1.0)
    noise = flow.add("RandomNoise", noise_seed=3)
    links = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas, "latent_image": "latent"}
    return flow.add("SamplerCustomAdvanced", **{name: [link, 0] for name, link in links.items()})


def with_pictures(kind: str, *names: str) -> Callable[[Workflow], str]:
    """An I2V model, conditioned by ComfyUI's own node."""

    def graph(flow: Workflow) -> str:
        pictures = {name: ["picture", 0] for name in names}
        links = {name: [name, 0] for name in ("positive", "negative", "vae")}
        made = flow.add(kind, width=WIDTH, height=HEIGHT, length=FRAMES, batch_size=1, **links, **pictures)
        return flow.sampled(flow.model("I2V"), positive=[made, 0], negative=[made, 1], latent_image=[made, 2])

    return graph


def known_frame(flow: Workflow) -> str:
    return flow.sampled(flow.model("TI2V-5B"), "uni_pc", latent_image=[flow.add("TestKnownFrame", seed=4), 0])


def cached(flow: Workflow) -> str:
    settings = {"reuse_threshold": 1.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
    return flow.sampled(flow.model("T2V high", ("EasyCache", settings)), steps=8)


def windows(flow: Workflow) -> str:
    settings = {"context_length": 5, "context_overlap": 4, "context_schedule": "standard_static", "context_stride": 1}
    settings |= {"closed_loop": False, "fuse_method": "pyramid"}
    return flow.sampled(flow.model("T2V high", ("WanContextWindowsManual", settings)))


def with_lora(flow: Workflow) -> str:
    loader = ("LoraLoaderModelOnly", {"lora_name": LORA, "strength_model": 0.8})
    return flow.sampled(flow.model("T2V high", loader), "res_multistep")


GRAPHS: dict[str, Callable[[Workflow], str]] = {
    "euler": lambda flow: flow.sampled(flow.model("T2V high")),
    "one prompt": lambda flow: flow.sampled(flow.model("T2V high"), cfg=1.0),
    "two stages": two_stages,
    "custom": custom,
    "image to video": with_pictures("WanImageToVideo", "start_image"),
    "first and last frame": with_pictures("WanFirstLastFrameToVideo", "start_image", "end_image"),
    "known frame": known_frame,
    "EasyCache": cached,
    "context windows": windows,
    "LoRA": with_lora,
}
FEW = ("euler", "one prompt", "image to video", "known frame")
LAYOUTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "1 rank": ({"gpu_count": 1}, FEW),
    "2 ranks, CFG parallel": ({"gpu_count": 2, "cfg_parallel": "on"}, tuple(GRAPHS)),
    "2 ranks, Ulysses": ({"gpu_count": 2, "cfg_parallel": "off"}, FEW),
    "3 ranks": ({"gpu_count": 3, "use_fsdp": True}, FEW),
    "4 ranks, both": ({"gpu_count": 4, "cfg_parallel": "on"}, FEW),
}
"""The config -> which graphs run in it."""
CONFIG = {
    "gpu_count": 1, "use_ulysses": True, "use_fsdp": False, "offload_model": False, "master_port": 0,
    "memory_optimization": False, "torch_compile": False, "mixed_precision": "fp32", "keep_warm_seconds": 120,
}  # fmt: skip


@pytest.fixture(scope="module")
def build(comfy: Comfy) -> Callable[..., Workflow]:
    """(loader, config's settings) -> a workflow; the files are there, with text of umT5-xxl's channels."""
    folder = comfy.server.base / "models"
    seeds = {"T2V high": ("T2V", 20), "T2V low": ("T2V", 21), "I2V": ("I2V", 22), "TI2V-5B": ("TI2V-5B", 23)}
    experts = {name: write_expert(folder / "diffusion_models", kind, seed).name for name, (kind, seed) in seeds.items()}
    save_file(lora(24), folder / "loras" / LORA)
    picture = comfy.picture(WIDTH, HEIGHT, "core.png")
    return lambda loader, **config: Workflow(loader, experts, comfy.model.vae, picture, {**CONFIG, **config})


def run(comfy: Comfy, flow: Workflow, graphs: tuple[str, ...]) -> Run:
    for graph in graphs:
        flow.save(graph, GRAPHS[graph](flow))
    return comfy.run(flow.prompt)


def latents(comfy: Comfy, loader: str, graph: str) -> torch.Tensor:
    """The last that were saved."""
    files = sorted((comfy.server.base / "output" / loader).glob(f"{graph}_*.latent"))
    return load_file(files[-1])["latent_tensor"]


@pytest.fixture(scope="module")
def theirs(comfy: Comfy, build: Callable[..., Workflow]) -> dict[str, torch.Tensor]:
    """Graph -> the latents of ComfyUI's own model."""
    ended = run(comfy, build(THEIRS), tuple(GRAPHS))
    assert ended.ending[0] == "execution_success", ended.ending[1].get("exception_message")
    return {graph: latents(comfy, THEIRS, graph) for graph in GRAPHS}


@pytest.fixture(autouse=True)
def released(comfy: Comfy) -> Iterator[None]:
    yield
    comfy.server.request("/wan_distributed/release", {})


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


def check_another(comfy: Comfy, build: Callable[..., Workflow], theirs: dict[str, torch.Tensor], **config: Any) -> None:
    """What is sampled afterwards is right."""
    ended = run(comfy, build(OURS, **config), ("euler",))
    assert ended.ending[0] == "execution_success", ended.ending[1].get("exception_message")
    assert (latents(comfy, OURS, "euler") - theirs["euler"]).abs().max() < LIMIT


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
    assert time.monotonic() - pressed[0] < 1
    check_another(comfy, build, theirs, **{**TWO, "stall_timeout": 61})
    assert comfy.job_processes() == processes and len(processes) == 3, "the agent and two ranks"
    assert comfy.job_folders() == []


def test_a_killed_rank_ends_the_sampling_in_its_words(
    comfy: Comfy, build: Callable[..., Workflow], theirs: dict[str, torch.Tensor]
) -> None:
    def kill(_: Run) -> None:
        (job,) = comfy.job_folders()
        os.kill(json.loads((job.parent / "rank1.alive").read_text())["pid"], signal.SIGKILL)

    ended = comfy.run(endless(build(OURS, **TWO), seed=101), at_step(kill))
    assert ended.ending[0] == "execution_error"
    assert ended.ending[1]["exception_message"].startswith("rank 1 was killed by SIGKILL"), ended.ending
    assert comfy.wait_until_idle(2) < 2 and comfy.job_folders() == []
    check_another(comfy, build, theirs, **{**TWO, "stall_timeout": 62})


def test_free_memory_lets_the_processes_go(
    comfy: Comfy, build: Callable[..., Workflow], theirs: dict[str, torch.Tensor]
) -> None:
    check_another(comfy, build, theirs, **{**TWO, "stall_timeout": 63})
    assert len(comfy.job_processes()) == 3
    comfy.server.request("/free", {"unload_models": True, "free_memory": True})
    assert comfy.wait_until_idle(2) < 2


def test_what_needs_the_inside_is_refused_without_a_process(comfy: Comfy, build: Callable[..., Workflow]) -> None:
    flow = build(OURS)
    scales = {"scale_x": 1.0, "shift_x": 0.0, "scale_y": 1.0, "shift_y": 0.0, "scale_t": 0.5, "shift_t": 0.0}
    flow.save("refused", flow.sampled(flow.model("T2V high", ("ScaleROPE", scales))))
    ended = comfy.run(flow.prompt)
    assert ended.ending[0] == "execution_error"
    assert "rope_options" in ended.ending[1]["exception_message"], ended.ending
    assert comfy.job_processes() == []
