"""The loader of a VAE for ComfyUI's own nodes, in the place of Load VAE."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from ...wan.model.latent_space import WAN21, WAN22
from ..host import warm
from ..host.core_vae import vae_without_weights
from ..host.declared import as_declared
from ..models import catalogue
from ..models.loaders import default_vae
from ..settings.spread import DistributedConfig
from .door_config import config_or_default
from .vae_jobs import VaeJobs

if TYPE_CHECKING:
    from ...wan.vae.vae_keys import VaeInfo

KNOWN_TO_COMFYUI = {WAN21: (96, 96), WAN22: (160, 256)}
"""Channels of the encoder's first stage and of the decoder's last one, of the VAEs as they were released."""


class LoadVAEDistributed:
    DESCRIPTION = (
        "Loads a Wan VAE as Load VAE does, for VAE Decode, VAE Encode, WanImageToVideo and every other node with a VAE "
        "input, but computes it on several GPUs, each some rows of the picture: in the processes of Load Diffusion "
        "Model (N GPUs) where they have the same config. ComfyUI itself holds no weights."
    )
    CATEGORY = "WanVideoDistributed"
    FUNCTION = "load"
    RETURN_TYPES = ("VAE",)
    RETURN_NAMES = ("vae",)
    OUTPUT_TOOLTIPS = ("The VAE, for VAE Decode, VAE Encode, WanImageToVideo and the like.",)
    SEARCH_ALIASES: ClassVar[list[str]] = ["vae loader", "multi gpu", "wan vae", "vae decode"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        names = catalogue.vae_names()
        return {
            "required": {
                "vae_name": (
                    names,
                    {
                        **default_vae(names),
                        "tooltip": "The Wan2.1 VAE for A14B models, such as wan_2.1_vae.safetensors in models/vae; the "
                        "Wan2.2 VAE (wan2.2_vae.safetensors) for TI2V-5B. Also .gguf and .pth files, VAEs in official "
                        "or diffusers folders, and all-in-one files.",
                    },
                ),
            },
            "optional": {
                "config": (
                    "WAN_DISTRIBUTED_CONFIG",
                    {
                        "tooltip": "From Wan Video Distributed Config: the one of Load Diffusion Model (N GPUs), so "
                        "that both share their processes. None: all suitable GPUs, and the processes stay for a "
                        "minute."
                    },
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, vae_name: str | None = None, **_: Any) -> str:
        # None: the name comes through a link.
        return "" if vae_name is None else catalogue.fingerprint(catalogue.vae_files(vae_name))

    @as_declared
    def load(self, vae_name: str, config: DistributedConfig | None = None) -> tuple[Any]:
        from ...wan.vae.vae_keys import check_vae_file, vae_shapes

        config = config_or_default(config)
        files = catalogue.identities(catalogue.vae_files(vae_name))
        info = check_vae_file(files[0].path)
        jobs = VaeJobs(files, config, info.kind, info.upscale, warm.vae_calls())
        return (vae_without_weights(vae_shapes(_as_released(info)), info.upscale, jobs),)


def _as_released(info: VaeInfo) -> VaeInfo:
    """One of the same kind that ComfyUI knows, under the official names. Its nodes see no other sizes."""
    base, decoder_base = KNOWN_TO_COMFYUI[info.kind]
    return dataclasses.replace(info, base_dim=base, decoder_base_dim=decoder_base, upscale=1, prefix="", official=True)
