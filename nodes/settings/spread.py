"""How a run is spread over GPUs: the config node and the value that it hands on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from ...distributed.job.job import Parallel
from ...distributed.job.setting import choice, number, setting_of
from ...distributed.job.switches import MAX_GPUS, Switches
from ..host.declared import as_declared, problem_of
from .hostfiles import THIS_MACHINE, hostfile_names
from .widgets import widget

AS_SET = "as set"
REQUIRED = {
    "gpu_count": "How many GPUs work on one video, one process each. 0: all suitable GPUs. "
    "On a machine without a GPU: that many CPU processes.",
    "use_ulysses": "Split the video's tokens over the GPUs (Ulysses sequence parallelism). "
    "Each step gets faster; every GPU holds the whole model unless use_fsdp is on.",
    "use_fsdp": "Shard the weights over the GPUs (FSDP2): each GPU keeps 1/N of the model and gathers one block at a "
    "time. Needed where both 14B experts do not fit on one GPU.",
    "offload_model": "The expert that is not at work waits in host memory. Halves the GPU memory for weights, "
    "costs one transfer at the switch between the experts.",
    "master_port": "0: the processes find each other through memory, no TCP port is opened for it. "
    "1024 to 65535: through that port on 127.0.0.1.",
    "memory_optimization": "Trade some speed for a lower memory peak: chunked feed-forward layers, "
    "no cached cross-attention keys.",
    "torch_compile": "Compile the parts of each block around the attention. "
    "The first step waits for the compiler, later steps are faster.",
    "mixed_precision": "Precision of matrix products and attention. "
    "Residuals, modulation and the solver stay fp32 always.",
}
OPTIONAL = {
    "gpu_ids": "Which physical GPUs to use: indices of nvidia-smi or UUIDs, separated by commas. "
    "Empty: any suitable GPU.",
    "ulysses_engine": "How GPUs exchange around the attention; the same video. symmetric: into each other's memory "
    "while they compute, through the host's memory where they have no peer access. packed: one all-to-all in, "
    "one out; slower, less memory. auto: symmetric where it fits. deepspeed: DeepSpeed's "
    "DistributedAttention, for comparison.",
    "start_timeout": "Seconds until all processes must have joined and loaded the model.",
    "stall_timeout": "Seconds without a sign of life from a process after which the job is ended. "
    "Raise it if one step takes longer than this.",
    "keep_warm_seconds": "Seconds for which the processes keep the model on the GPUs after a video, so that "
    "the next one starts at once. 0: they end with the video. ComfyUI's 'Free memory' and this "
    "node's 'Release GPUs' (right click) end them at any time.",
    "cfg_parallel": "Half of the GPUs compute what the prompt asks for, half what the negative prompt "
    "does, at the same time: the fastest split when guidance is over 1. The video is the same. "
    "auto: on with an even number of GPUs and guidance over 1 at every step.",
    "stream_blocks": "For small GPUs: the model waits in host memory, and each block is copied to the "
    "GPU while the one before it computes. The GPU holds two blocks at a time; the host needs "
    "room for both experts on each GPU's behalf. Does not go with use_fsdp when plan is 'as set'.",
    "plan": "auto: the fastest layout that fits the GPUs' free memory; the status says which and why. gpu_count 0 "
    "then picks the GPUs, use_fsdp shards only where memory needs it, and offload_model, stream_blocks and "
    "memory_optimization, when off, are turned on only where nothing else fits, or where sharding over slow links "
    "would take longer. as set: every switch as it is.",
    "attention": "The attention kernel. auto: the fastest exact one for the GPU. fa3 (Hopper) needs "
    "the package fa3-fwd. fa3-fp8 and sage compute in 8 bits: faster, but the video changes. "
    "sol (package comfy-kitchen) leaves out what matters little in the later steps of long videos: "
    "much faster, but the video changes.",
    "linear_precision": "fp8: the large matrix products in 8 bits, for half of the weights' memory and "
    "more speed; the video changes. Needs an Ada, Hopper or newer GPU and mixed_precision bf16. int8: the same "
    "memory on any GPU; int8 files stay as they are. With the package comfy-kitchen products are of int8 by int8 (on "
    "Hopper no faster than bf16), else weights are unpacked for each use.",
    "kernels": "How the arithmetic between the matrix products is computed. triton: fused GPU "
    "kernels, the same up to rounding, without the wait of torch_compile. plain: torch's own. "
    "auto: triton on Hopper, where it was measured, if a C compiler is there, else plain.",
    "hostfile": "Run on several machines: a file of user/wan_distributed/hostfiles with a line "
    "'NAME slots=GPUS' for each, as DeepSpeed's launcher reads it; gpu_count has no effect then. "
    "They need ssh without a password, pdsh, and ComfyUI's temp and model folders at the same "
    "paths.",
    "sparse_tau": "For attention sol only: how sparse it is. The larger, the faster, and the further "
    "the video is from the one of full attention.",
    "quantised_loras": "LoRAs of weights that a file has in 8 bits and that stay so; those of other files are merged "
    "before they are rounded. beside: computed beside the weights, exactly; a new strength on a warm group reads no "
    "weight. merged: rounded into the weights, which takes no time per step (beside: 8 %, with fp8 30 %), but loses "
    "most of a weak LoRA.",
    "exact_steps": "With attention fa3-fp8 or sage, or linear_precision fp8 or int8: so many of the first steps of a "
    "schedule, and of the last ones, round nothing to 8 bits, at the speed of full precision. Weights stay as they are "
    "kept. 0: all steps are in 8 bits.",
    "exact_blocks": "With the same: blocks that round nothing to 8 bits at any step, such as 0-1, 38-39. Their "
    "weights stay as the file has them, which takes memory where they would be rounded. Empty: none.",
}
"""Inputs of the config node with their tooltips; those that make videos have some of them, too."""
COMMON = {
    "gpu_count", "use_ulysses", "use_fsdp", "offload_model", "mixed_precision", "gpu_ids", "plan", "keep_warm_seconds",
}  # fmt: skip
"""The others are folded away by pages that can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedConfig(Switches):
    """The settings as the user gave them; GPUs are chosen when a job starts."""

    gpu_count: int = number(0, 0, MAX_GPUS)
    """0: all suitable GPUs."""
    gpu_ids: str = ""
    """Physical GPU indices or UUIDs, separated by commas; empty: any."""
    use_fsdp: bool = True
    cfg_parallel: str = choice("auto", ("auto", "on", "off"))
    plan: str = choice("auto", ("auto", AS_SET))
    hostfile: str = THIS_MACHINE
    """THIS_MACHINE, or the name of a file in `host.hostfiles_folder`."""

    @property
    def hosts(self) -> bool:
        """Whether a hostfile says where the job runs."""
        return self.hostfile != THIS_MACHINE

    def parallel(self, **layout: Any) -> Parallel:
        """The switches as they are, on one process unless `layout` says how a job is laid out."""
        shared = {
            # Widgets count seconds in whole numbers.
            field.name: float(value) if field.type == "float" else value
            for field in dataclasses.fields(Switches)
            for value in [getattr(self, field.name)]
        }
        return Parallel(**{**shared, "gpu_count": 1, **layout})


def config_input(name: str) -> tuple[Any, dict[str, Any]]:
    """The declaration of one of them."""
    placeholder = {"placeholder": "0,1"} if name == "gpu_ids" else {}
    kind, options = widget(DistributedConfig, name, {**REQUIRED, **OPTIONAL}[name], **placeholder)
    rare = {} if name in COMMON else {"advanced": True}
    return [THIS_MACHINE, *hostfile_names()] if name == "hostfile" else kind, {**options, **rare}


class WanVideoDistributedConfig:
    DESCRIPTION = (
        "How the video job is spread over GPUs: their number, sequence parallelism (Ulysses), weight sharding (FSDP), "
        "precision and time limits. For Wan Video Distributed Inference, over whose own values it wins, for Load "
        "Diffusion Model (N GPUs) and for Load VAE (N GPUs)."
    )
    CATEGORY = "WanVideoDistributed"
    FUNCTION = "build"
    RETURN_TYPES = ("WAN_DISTRIBUTED_CONFIG",)
    RETURN_NAMES = ("config",)
    OUTPUT_TOOLTIPS = (
        "The settings, for the config input of the nodes that make videos or load a model or a VAE for several GPUs.",
    )
    SEARCH_ALIASES: ClassVar[list[str]] = [
        "multi gpu", "ulysses", "fsdp", "torchrun", "sequence parallel", "context parallel", "cfg parallel",
        "sage attention", "flash attention", "torch compile", "block swap", "vram",
    ]  # fmt: skip

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        return {
            "required": {name: config_input(name) for name in REQUIRED},
            "optional": {name: config_input(name) for name in OPTIONAL},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, master_port: Any = None) -> bool | str:
        if master_port is None:
            return True
        # Naming an input here switches ComfyUI's own range check off for it, and its refusal of a wrong type is late.
        setting = setting_of(Switches, "master_port")
        assert setting is not None, "it has a range"
        problem = problem_of("master_port", config_input("master_port"), master_port)
        if problem is None and not setting.holds(master_port):
            problem = f"master_port is {master_port}; it must be {setting.allowed}"
        return problem or True

    @as_declared
    def build(self, **settings: Any) -> tuple[DistributedConfig]:
        return (DistributedConfig(**settings),)
