"""The model loader: names the files of a Wan2.2 model, loads no weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

from ...distributed.job.job import ModelFiles
from ...wan.files.identify import noise_side
from ..host.declared import as_declared
from . import catalogue
from .loras import lora_files

NONE = "none"


class LoadWanVideoModel:
    DESCRIPTION = (
        "Chooses the files of a Wan2.2 or Wan2.1 model: two experts or one transformer, the VAE, LoRAs and, if prompts "
        "are to be encoded inside the job, the text encoder. Reads only their headers; the weights are loaded by the "
        "job's processes, each its own part."
    )
    CATEGORY = "WanVideoDistributed"
    FUNCTION = "load"
    RETURN_TYPES = ("WAN_DISTRIBUTED_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model's files, for Wan Video Distributed Inference.",)
    SEARCH_ALIASES: ClassVar[list[str]] = ["wan2.2 loader", "load checkpoint", "unet loader", "gguf", "multi gpu"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        experts = catalogue.expert_names()
        vaes, encoders = catalogue.vae_names(), catalogue.text_encoder_names()
        return {
            "required": {
                "high_noise": (
                    [*experts, NONE],
                    {
                        "default": next((name for name in experts if noise_side(name) == "high"), [*experts, NONE][0]),
                        "tooltip": "The expert for the first, noisy steps, such as "
                        "wan2.2_t2v_high_noise_14B_fp16.safetensors in models/diffusion_models: .safetensors or .gguf, "
                        "an official or diffusers folder, or an all-in-one file of models/checkpoints. A model of one "
                        "transformer (TI2V-5B, Wan2.1, Animate) goes here, with none in low_noise.",
                    },
                ),
                "low_noise": (
                    [*experts, NONE],
                    {
                        "default": next((name for name in experts if noise_side(name) == "low"), NONE),
                        "tooltip": "The expert for the last steps, such as "
                        "wan2.2_t2v_low_noise_14B_fp16.safetensors. none: the transformer in high_noise runs all "
                        "steps.",
                    },
                ),
                "vae": (
                    vaes,
                    {
                        **default_vae(vaes),
                        "tooltip": "The Wan2.1 VAE for 14B and 1.3B models, such as wan_2.1_vae.safetensors in "
                        "models/vae; the Wan2.2 VAE (wan2.2_vae.safetensors) for 5B models.",
                    },
                ),
            },
            "optional": {
                "text_encoder": (
                    [NONE, *encoders],
                    {
                        # Most graphs have a prompt, and no other node that encodes it.
                        "default": default_text_encoder(encoders),
                        "tooltip": "umT5-xxl, for prompts that are encoded inside the job. "
                        "none: text_embeds come from another node.",
                    },
                ),
                "high_noise_lora": (
                    "WANVIDLORA",
                    {"tooltip": "LoRAs for the transformer in high_noise, from Wan Video Distributed Lora."},
                ),
                "low_noise_lora": (
                    "WANVIDLORA",
                    {"tooltip": "LoRAs for the transformer in low_noise, from Wan Video Distributed Lora."},
                ),
                "clip_vision": (
                    [NONE, *catalogue.clip_vision_names()],
                    {
                        "default": NONE,
                        "tooltip": "CLIP for models that look at their pictures (Wan2.1 I2V, FLF2V, Fun-Control), such "
                        "as clip_vision_h.safetensors in models/clip_vision: start_image and end_image go through it "
                        "inside the job. none: what CLIP sees comes from CLIP Vision Encode.",
                    },
                ),
            },
        }

    @classmethod
    def IS_CHANGED(
        cls,
        high_noise: str | None = None,
        low_noise: str | None = None,
        vae: str | None = None,
        text_encoder: str | None = NONE,
        clip_vision: str | None = NONE,
        **_: Any,
    ) -> str:
        # None: the name comes through a link. What LoRA links carry is fingerprinted by the nodes that made it.
        if high_noise is None or low_noise is None or vae is None or text_encoder is None or clip_vision is None:
            return ""
        model = _files(high_noise, low_noise, vae, text_encoder, clip_vision)
        return catalogue.fingerprint(Path(part.path) for part in model.all())

    @as_declared
    def load(
        self,
        high_noise: str,
        low_noise: str,
        vae: str,
        text_encoder: str = NONE,
        high_noise_lora: list[dict[str, Any]] | None = None,
        low_noise_lora: list[dict[str, Any]] | None = None,
        clip_vision: str = NONE,
    ) -> tuple[ModelFiles]:
        from ...distributed.planning.preflight import check_model

        loras = {"high_noise_lora": high_noise_lora, "low_noise_lora": low_noise_lora}
        files = {f"{name}s": lora_files(value, name) for name, value in loras.items()}
        model = _files(high_noise, low_noise, vae, text_encoder, clip_vision, **files)
        check_model(model)
        return (model,)


def _files(high_noise: str, low_noise: str, vae: str, text_encoder: str, clip_vision: str, **loras: Any) -> ModelFiles:
    if high_noise == NONE and low_noise == NONE:
        raise ValueError("high_noise and low_noise are both none; choose a transformer for at least one of them")
    encoder, tokenizer = ((), ()) if text_encoder == NONE else catalogue.text_encoder_files(text_encoder)
    return ModelFiles(
        high_noise=catalogue.identities(() if high_noise == NONE else catalogue.expert_files(high_noise)),
        low_noise=catalogue.identities(() if low_noise == NONE else catalogue.expert_files(low_noise)),
        vae=catalogue.identities(catalogue.vae_files(vae)),
        text_encoder=catalogue.identities(encoder),
        tokenizer=catalogue.identities(tokenizer),
        clip_vision=catalogue.identities(() if clip_vision == NONE else catalogue.clip_vision_files(clip_vision)),
        **loras,
    )


def default_vae(names: list[str]) -> dict[str, str]:
    """The Wan2.1 VAE as the default, where there is one: most models use it."""
    fitting = [name for name in names if "wan" in name.lower() and ("2.1" in name or "2_1" in name)]
    return {"default": fitting[0]} if fitting else {}


def default_text_encoder(names: list[str]) -> str:
    """umT5-xxl, where there is one; of several the one that is nearest to 16 bits, by its name."""

    def distance(name: str) -> int:
        bits = re.search(r"(?:bf|fp|q|int)(\d{1,2})", name, re.IGNORECASE)
        return abs(16 - int(bits[1])) if bits else 0

    fitting = [name for name in names if re.search("umt5[-_]?xxl", name, re.IGNORECASE)]
    return min(fitting, key=distance, default=NONE)
