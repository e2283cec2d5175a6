"""WANVIDEOMODEL of ComfyUI-WanVideoWrapper -> the files that it was loaded from.

It is a ModelPatcher whose `model.pipeline` is a dict with the checkpoint's path ("base_path") and the LoRA list
("lora"); the file is the model without the LoRAs, even where the wrapper merged them. What other nodes changed in
memory (patches, merged extra models) cannot be found on disk again, and is refused.
"""

from __future__ import annotations

from typing import Any

from ...distributed.job.errors import listed
from ...distributed.job.job import ModelFiles
from ...wan.files.identify import noise_side
from ..host import host
from ..host.declared import is_set, kind_of
from ..host.status import Status
from ..models import catalogue
from ..models.loras import lora_files
from ..models.model_paths import listed_file

AUTO = "auto"
EXTRA_MODELS = {
    "vace_layers": "VACE",
    "multitalk_audio_proj": "MultiTalk",
    "audio_model": "an audio model (Ovi)",
}
"""Attribute of the transformer, None without it -> the model that was merged into it."""
BASE_FOLDERS = ("diffusion_models", "unet_gguf")
"""Model folders that WanVideoModelLoader chooses from."""
NOT_NEEDED = {"block_swap_args", "attention_mode_override", "merge_loras"}
"""Of transformer_options: they change memory and speed of the wrapper's own run, not the video."""
LORA_ADVICE = "set LoRAs in WanVideoModelLoader, or choose the model with Load Wan Video Model and connect them there"


def files_of(model: Any, low_noise_model: Any, vae: str, status: Status) -> ModelFiles:
    """The files of one or two WANVIDEOMODELs, with a VAE for them.

    Args:
        model: the high-noise expert, or the only transformer.
        low_noise_model: the other expert or None.
        vae: one of `catalogue.vae_names()`, or AUTO: the only one in models/vae that fits.
    Raises:
        ValueError: if the model cannot be made again from files, or there is no VAE for it.
    """
    name = "model"
    if low_noise_model is None:
        side = "low_noise" if noise_side(_base_path(model, name)) == "low" else "high_noise"
        parts = _expert(model, name, side, status)
    else:
        parts = _expert(model, name, "high_noise", status)
        parts |= _expert(low_noise_model, "low_noise_model", "low_noise", status)
    files = {"high_noise": (), "low_noise": (), **parts}
    chosen = catalogue.vae_files(vae if vae != AUTO else _only_fitting_vae(files["high_noise"] or files["low_noise"]))
    return ModelFiles(**files, vae=catalogue.identities(chosen))


def _expert(value: Any, name: str, slot: str, status: Status) -> dict[str, Any]:
    """Fields of ModelFiles for one expert."""
    from ...wan.checkpoint.checkpoint import checkpoint_files

    path = listed_file(_base_path(value, name), *BASE_FOLDERS, name=f"the checkpoint of {name}")
    pipeline = value.model.pipeline
    for attribute, what in EXTRA_MODELS.items():
        extra = getattr(getattr(value.model, "diffusion_model", None), attribute, None)
        if extra is not None and not (isinstance(extra, list | tuple) and not extra):
            raise ValueError(
                f"{name} has {what} merged into it, which this node does not run; load the model without it"
            )
    if is_set(pipeline.get("control_lora")):
        raise ValueError(f"{name} has a control LoRA in it, which this node does not run; load the model without it")
    loras = lora_files(pipeline.get("lora"), f"LoRA of {name}")
    _check_options(value, name)
    _check_patches(value, name)
    quantization = pipeline.get("quantization")
    if is_set(quantization) and quantization != "disabled":
        says = f"WanVideoModelLoader says {listed([quantization])}"
        status.warn(f"{name}: the weights keep the precision of their file ({says})")
    return {
        slot: catalogue.identities(checkpoint_files(path)),
        f"{slot}_loras": loras,
    }


def _base_path(value: Any, name: str) -> str:
    pipeline = getattr(getattr(value, "model", None), "pipeline", None)
    path = pipeline.get("base_path") if isinstance(pipeline, dict) else None
    if not isinstance(path, str):
        raise ValueError(
            f"{name} is {kind_of(value)} without a checkpoint's path; "
            "connect Load Wan Video Model or WanVideoModelLoader"
        )
    return path


def _check_options(value: Any, name: str) -> None:
    options = _dictionary(_dictionary(getattr(value, "model_options", {})).get("transformer_options", {}))
    # Set by WanVideoSetLoRAs even where it schedules nothing.
    if "lora_scheduling_enabled" in options:
        raise ValueError(f"{name} has LoRAs set by WanVideoSetLoRAs, whose files it does not name; {LORA_ADVICE}")
    other = [key for key, held in options.items() if key not in NOT_NEEDED and held is not None and held is not False]
    if other:
        raise ValueError(
            f"{name} carries {listed(sorted(other, key=str))}, which this node does not support; "
            "take out the node that sets it"
        )


def _check_patches(value: Any, name: str) -> None:
    """Unmerged LoRAs are patches in memory, one per weight and LoRA: the loader's list must account for all of them."""
    # A list by now, or nothing: its files have been looked up.
    named = len(value.model.pipeline.get("lora") or [])
    patched = _dictionary(getattr(value, "patches", {})).values()
    most = max((len(patches) if isinstance(patches, list | tuple) else 1 for patches in patched), default=0)
    if most > named:
        raise ValueError(f"{name} has {most} LoRAs patched into it, and names the files of {named}; {LORA_ADVICE}")


def _dictionary(value: Any) -> dict[Any, Any]:
    """What a model of another pack keeps there; nothing where it keeps something else."""
    return value if isinstance(value, dict) else {}


def _only_fitting_vae(transformer: Any) -> str:
    """The one VAE in models/vae whose latents are the transformer's."""
    from ...wan.checkpoint.checkpoint import Checkpoint
    from ...wan.vae.vae_keys import check_vae_file

    channels = Checkpoint([file.path for file in transformer]).config.out_dim
    fitting = []
    for name in host.model_files("vae"):
        try:
            if check_vae_file(host.model_path("vae", name)).z_dim == channels:
                fitting.append(name)
        except ValueError:
            # Not a Wan VAE: the folder holds those of other models too.
            continue
    if len(fitting) != 1:
        found = f"{len(fitting)} of them fit: {', '.join(fitting)}" if fitting else "none fits"
        raise ValueError(
            f"vae is auto, which takes the only VAE in models/vae with {channels} latent channels, but {found}. "
            "Choose one in vae"
        )
    return fitting[0]
