"""How a run is spread over GPUs: the config node and the value that it hands on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...distributed.job.job import (
    ATTENTION,
    KERNELS,
    LINEAR_PRECISION,
    MAX_GPUS,
    MAX_SPARSE_TAU,
    MIXED_PRECISION,
    ULYSSES_ENGINES,
)
from ..host.declared import as_declared, problem_of
from .hostfiles import THIS_MACHINE, hostfile_names

GPU_COUNT = {
    "default": 0,
    "min": 0,
    "max": MAX_GPUS,
    "tooltip": "How many GPUs work on one video, one process each. 0: all suitable GPUs. "
    "On a machine without a GPU: that many CPU processes.",
}
USE_ULYSSES = {
    "default": True,
    "tooltip": "Split the video's tokens over the GPUs (Ulysses sequence parallelism). "
    "Each step gets faster; every GPU holds the whole model unless use_fsdp is on.",
}
USE_FSDP = {
    "default": True,
    "tooltip": "Shard the weights over the GPUs (FSDP2): each GPU keeps 1/N of the model and gathers one block at a "
    "time. Needed where both 14B experts do not fit on one GPU.",
}
OFFLOAD_MODEL = {
    "default": False,
    "tooltip": "The expert that is not at work waits in host memory. Halves the GPU memory for weights, "
    "costs one transfer at the switch between the experts.",
}
AS_SET = "as set"
PLAN = {
    "default": "auto",
    "tooltip": "auto: the fastest layout that fits the GPUs' free memory; the status says which and why. gpu_count 0 "
    "then picks the GPUs, use_fsdp shards only where memory needs it, and offload_model, stream_blocks and "
    "memory_optimization, when off, are turned on only where nothing else fits. as set: every switch as it is.",
}
"""On this node and on those that make videos."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedConfig:
    """The settings as the user gave them; GPUs are chosen when a job starts."""

    gpu_count: int
    """0: all suitable GPUs."""
    use_ulysses: bool
    use_fsdp: bool
    offload_model: bool
    master_port: int = 0
    memory_optimization: bool = False
    torch_compile: bool = False
    mixed_precision: str = "bf16"
    gpu_ids: str = ""
    """Physical GPU indices or UUIDs, separated by commas; empty: any."""
    ulysses_engine: str = "packed"
    start_timeout: int = 600
    """Seconds."""
    stall_timeout: int = 600
    """Seconds."""
    keep_warm_seconds: int = 0
    cfg_parallel: str = "auto"
    """auto, on or off."""
    stream_blocks: bool = False
    plan: str = "auto"
    """auto or `AS_SET`."""
    attention: str = "auto"
    linear_precision: str = "full"
    kernels: str = "auto"
    hostfile: str = THIS_MACHINE
    """THIS_MACHINE, or the name of a file in `host.hostfiles_folder`."""
    sparse_tau: float = 1.0

    @property
    def hosts(self) -> bool:
        """Whether a hostfile says where the job runs."""
        return self.hostfile != THIS_MACHINE


class WanVideoDistributedConfig:
    DESCRIPTION = (
        "How the video job is spread over GPUs: their number, sequence parallelism (Ulysses), weight sharding (FSDP), "
        "precision and time limits. Connect it to Wan Video Distributed Inference: its values win over that node's own."
    )
    CATEGORY = "WanVideoDistributed"
    FUNCTION = "build"
    RETURN_TYPES = ("WAN_DISTRIBUTED_CONFIG",)
    RETURN_NAMES = ("config",)
    OUTPUT_TOOLTIPS = ("The settings, for the config input of Wan Video Distributed Inference.",)
    SEARCH_ALIASES: ClassVar[list[str]] = ["multi gpu", "ulysses", "fsdp", "torchrun"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        return {
            "required": {
                "gpu_count": ("INT", GPU_COUNT),
                "use_ulysses": ("BOOLEAN", USE_ULYSSES),
                "use_fsdp": ("BOOLEAN", USE_FSDP),
                "offload_model": ("BOOLEAN", OFFLOAD_MODEL),
                "master_port": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 65535,
                        "tooltip": "0: the processes find each other through memory, no TCP port is opened for it. "
                        "1024 to 65535: through that port on 127.0.0.1.",
                    },
                ),
                "memory_optimization": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Trade some speed for a lower memory peak: chunked feed-forward layers, "
                        "no cached cross-attention keys.",
                    },
                ),
                "torch_compile": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Compile the parts of each block around the attention. "
                        "The first step waits for the compiler, later steps are faster.",
                    },
                ),
                "mixed_precision": (
                    list(MIXED_PRECISION),
                    {
                        "default": "bf16",
                        "tooltip": "Precision of matrix products and attention. "
                        "Residuals, modulation and the solver stay fp32 always.",
                    },
                ),
            },
            "optional": {
                "gpu_ids": (
                    "STRING",
                    {
                        "default": "",
                        "placeholder": "0,1",
                        "tooltip": "Which physical GPUs to use: indices of nvidia-smi or UUIDs, separated by commas. "
                        "Empty: any suitable GPU.",
                    },
                ),
                "ulysses_engine": (
                    list(ULYSSES_ENGINES),
                    {
                        "default": "packed",
                        "tooltip": "packed: one all-to-all into the attention and one out of it. symmetric: GPUs write "
                        "into each other's memory while they compute, where they have peer access; the same video. "
                        "deepspeed: DeepSpeed's DistributedAttention, for comparison.",
                    },
                ),
                "start_timeout": (
                    "INT",
                    {
                        "default": 600,
                        "min": 1,
                        "max": 86400,
                        "tooltip": "Seconds until all processes must have joined and loaded the model.",
                    },
                ),
                "stall_timeout": (
                    "INT",
                    {
                        "default": 600,
                        "min": 1,
                        "max": 86400,
                        "tooltip": "Seconds without a sign of life from a process after which the job is ended. "
                        "Raise it if one step takes longer than this.",
                    },
                ),
                "keep_warm_seconds": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 86400,
                        "tooltip": "Seconds for which the processes keep the model on the GPUs after a video, so that "
                        "the next one starts at once. 0: they end with the video. ComfyUI's 'Free memory' and this "
                        "node's 'Release GPUs' (right click) end them at any time.",
                    },
                ),
                "cfg_parallel": (
                    ["auto", "on", "off"],
                    {
                        "default": "auto",
                        "tooltip": "Half of the GPUs compute what the prompt asks for, half what the negative prompt "
                        "does, at the same time: the fastest split when guidance is over 1. The video is the same. "
                        "auto: on with an even number of GPUs and guidance over 1 at every step.",
                    },
                ),
                "stream_blocks": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "For small GPUs: the model waits in host memory, and each block is copied to the "
                        "GPU while the one before it computes. The GPU holds two blocks at a time; the host needs "
                        "room for both experts on each GPU's behalf. Does not go with use_fsdp when plan is 'as set'.",
                    },
                ),
                "plan": (["auto", AS_SET], PLAN),
                "attention": (
                    list(ATTENTION),
                    {
                        "default": "auto",
                        "tooltip": "The attention kernel. auto: the fastest exact one for the GPU. fa3 (Hopper) needs "
                        "the package fa3-fwd. fa3-fp8 and sage compute in 8 bits: faster, but the video changes. "
                        "sol (package comfy-kitchen) leaves out what matters little in the later steps of long videos: "
                        "much faster, but the video changes.",
                    },
                ),
                "linear_precision": (
                    list(LINEAR_PRECISION),
                    {
                        "default": "full",
                        "tooltip": "fp8: the large matrix products in 8 bits, for half of the weights' memory and "
                        "more speed; the video changes. Needs an Ada, Hopper or newer GPU and mixed_precision bf16.",
                    },
                ),
                "kernels": (
                    list(KERNELS),
                    {
                        "default": "auto",
                        "tooltip": "How the arithmetic between the matrix products is computed. triton: fused GPU "
                        "kernels, the same up to rounding, without the wait of torch_compile. plain: torch's own. "
                        "auto: triton on Hopper, where it was measured, if a C compiler is there, else plain.",
                    },
                ),
                "hostfile": (
                    [THIS_MACHINE, *hostfile_names()],
                    {
                        "default": THIS_MACHINE,
                        "tooltip": "Run on several machines: a file of user/wan_distributed/hostfiles with a line "
                        "'NAME slots=GPUS' for each, as DeepSpeed's launcher reads it; gpu_count has no effect then. "
                        "They need ssh without a password, pdsh, and ComfyUI's temp and model folders at the same "
                        "paths.",
                    },
                ),
                "sparse_tau": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.1,
                        "max": MAX_SPARSE_TAU,
                        "step": 0.1,
                        "tooltip": "For attention sol only: how sparse it is. The larger, the faster, and the further "
                        "the video is from the one of full attention.",
                    },
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, master_port: Any = None) -> bool | str:
        if master_port is None:
            return True
        # Naming an input here switches ComfyUI's own range check off for it, and its refusal of a wrong type is late.
        problem = problem_of("master_port", cls.INPUT_TYPES()["required"]["master_port"], master_port)
        if problem is None and 1 <= master_port < 1024:
            problem = f"master_port is {master_port}; it must be 0 (no port) or 1024 to 65535"
        return problem or True

    @as_declared
    def build(self, **settings: Any) -> tuple[DistributedConfig]:
        return (DistributedConfig(**settings),)
