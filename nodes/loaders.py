"""The model loader: names the files of a Wan2.2 model, loads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from ..distributed.job import FileIdentity, ModelFiles
from . import catalogue, host

NONE = "none"


class LoadWanVideoModel:
    DESCRIPTION = (
        "Chooses the files of a Wan2.2 model: two experts, the VAE and, if prompts are to be encoded inside the job, "
        "the text encoder. Reads only their headers; the weights are loaded by the job's processes, each its own part."
    )
    CATEGORY = "WanVideoDistributed"
    FUNCTION = "load"
    RETURN_TYPES = ("WAN_DISTRIBUTED_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model's files, for Wan Video Distributed Inference.",)
    SEARCH_ALIASES: ClassVar[list[str]] = ["wan2.2 loader", "multi gpu"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        experts = catalogue.expert_names()
        vaes = catalogue.vae_names()
        return {
            "required": {
                "high_noise": (
                    experts,
                    _prefer(
                        experts,
                        ("high",),
                        "The expert for the first, noisy steps, such as "
                        "wan2.2_t2v_high_noise_14B_fp16.safetensors in models/diffusion_models, or an official "
                        "folder's high_noise_model.",
                    ),
                ),
                "low_noise": (
                    experts,
                    _prefer(
                        experts,
                        ("low",),
                        "The expert for the last steps, such as wan2.2_t2v_low_noise_14B_fp16.safetensors in "
                        "models/diffusion_models, or an official folder's low_noise_model.",
                    ),
                ),
                "vae": (
                    vaes,
                    _prefer(
                        vaes,
                        ("wan", "2.1"),
                        "The Wan2.1 VAE (the A14B models use it), such as wan_2.1_vae.safetensors in models/vae.",
                    ),
                ),
            },
            "optional": {
                "text_encoder": (
                    [NONE, *catalogue.text_encoder_names()],
                    {
                        "default": NONE,
                        "tooltip": "umT5-xxl, for prompts that are encoded inside the job. "
                        "none: text_embeds come from another node.",
                    },
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, **names: str | None) -> str:
        if any(name is None for name in names.values()):
            return ""
        model = _files(**names)
        return host.fingerprint(Path(part.path) for part in model.all())

    def load(self, high_noise: str, low_noise: str, vae: str, text_encoder: str = NONE) -> tuple[ModelFiles]:
        from ..distributed.preflight import check_model

        model = _files(high_noise, low_noise, vae, text_encoder)
        check_model(model)
        return (model,)


def _files(high_noise: str, low_noise: str, vae: str, text_encoder: str = NONE) -> ModelFiles:
    encoder, tokenizer = ((), ()) if text_encoder == NONE else catalogue.text_encoder_files(text_encoder)
    return ModelFiles(
        high_noise=_identities(catalogue.expert_files(high_noise)),
        low_noise=_identities(catalogue.expert_files(low_noise)),
        vae=_identities(catalogue.vae_files(vae)),
        text_encoder=_identities(encoder),
        tokenizer=_identities(tokenizer),
    )


def _identities(paths: Sequence[Path]) -> tuple[FileIdentity, ...]:
    return tuple(FileIdentity.of(path) for path in paths)


def _prefer(names: list[str], words: tuple[str, ...], tooltip: str) -> dict[str, Any]:
    """Input options whose default is the first name with all `words` in it."""
    fitting = [name for name in names if all(word in name.lower() for word in words)]
    return {"tooltip": tooltip, **({"default": fitting[0]} if fitting else {})}
