"""The loader of a transformer for ComfyUI's own samplers, in the place of Load Diffusion Model."""

from __future__ import annotations

from typing import Any, ClassVar

from ..host import warm
from ..host.core_model import model_without_weights
from ..host.declared import as_declared
from ..models import catalogue
from ..models.loras import lora_files
from ..settings.spread import DistributedConfig
from .door_config import config_or_default
from .group_model import GroupModel
from .sampling_jobs import SamplingJobs


class LoadDiffusionModelDistributed:
    DESCRIPTION = (
        "Loads a Wan transformer as Load Diffusion Model does, for KSampler and every other sampler and node of "
        "ComfyUI's, but computes it on several GPUs: in processes that start with the first step and stay for "
        "keep_warm_seconds of the config. ComfyUI itself holds no weights."
    )
    CATEGORY = "WanVideoDistributed"
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model, for KSampler, LoraLoaderModelOnly, ModelSamplingSD3, EasyCache and the like.",)
    SEARCH_ALIASES: ClassVar[list[str]] = ["unet loader", "multi gpu", "wan ksampler", "diffusion model"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        return {
            "required": {
                "unet_name": (
                    catalogue.expert_names(),
                    {
                        "tooltip": "The transformer, such as wan2.2_t2v_high_noise_14B_fp16.safetensors in "
                        "models/diffusion_models: .safetensors or .gguf, an official or diffusers folder, or an "
                        "all-in-one file of models/checkpoints. A model of two experts takes two of these nodes, as "
                        "with Load Diffusion Model."
                    },
                ),
            },
            "optional": {
                "config": (
                    "WAN_DISTRIBUTED_CONFIG",
                    {
                        "tooltip": "From Wan Video Distributed Config: one for both experts, so that they share their "
                        "processes, with keep_warm_seconds for as long as the workflow does other things in between. "
                        "None: all suitable GPUs, and the processes stay for a minute."
                    },
                ),
                "lora": (
                    "WANVIDLORA",
                    {
                        "tooltip": "LoRAs from Wan Video Distributed Lora, which the processes read themselves. "
                        "ComfyUI's LoraLoaderModelOnly works as well, and reads the file here first."
                    },
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, unet_name: str | None = None, **_: Any) -> str:
        # None: the name comes through a link.
        return "" if unet_name is None else catalogue.fingerprint(catalogue.expert_files(unet_name))

    @as_declared
    def load(
        self, unet_name: str, config: DistributedConfig | None = None, lora: list[dict[str, Any]] | None = None
    ) -> tuple[Any]:
        from ...wan.checkpoint.checkpoint import Checkpoint

        config = config_or_default(config)
        files = catalogue.identities(catalogue.expert_files(unet_name))
        checkpoint = Checkpoint([file.path for file in files])
        forwards = SamplingJobs(files, lora_files(lora, "lora"), config, checkpoint.config, warm.evaluators())
        return (model_without_weights(checkpoint.shapes, GroupModel(forwards.prepare)),)
