"""A Fun-Control model's control as ComfyUI-WanVideoWrapper hands it on, in WANVIDIMAGE_EMBEDS -> the tensors of a job.

WanVideoControlEmbeds and WanVideoAddControlEmbeds add control_embeds, a dict of control_images [16, T, h, w],
fun_ref_image [1, 16, h, w], both normalised, and the share of the steps that follow it. What a video starts from is
beside it, as image_embeds [16, T, h, w] and mask [4, T, h, w], 1 where known; zeros where it is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...distributed.job.control_inputs import REFERENCE_LATENT
from ...distributed.job.errors import check, listed
from ...wan.model.latent_space import TEMPORAL_STRIDE
from ...wan.model.variants import CONTROL, MASK, PICTURE, takers
from ..host.declared import is_set, kind_of
from ..host.tensors import tensor_of
from .latent_input import check_video_size

if TYPE_CHECKING:
    from torch import Tensor

    from ...distributed.job.job import Sampling
    from ...wan.model.config import WanConfig

KEY = "control_embeds"
IMAGES, REFERENCE = "control_images", "fun_ref_image"
WHOLE = {"start_percent": 0.0, "end_percent": 1.0}
"""Shares of the steps at which every one of them follows the control."""
CAMERA = frozenset({"control_camera_start_percent", "control_camera_end_percent"})
"""Of a camera's path, without effect where there is none."""


def has_control(embeds: Any) -> bool:
    """Whether WANVIDIMAGE_EMBEDS hold a control."""
    return isinstance(embeds, dict) and is_set(embeds.get(KEY))


def has_reference_embeds(embeds: Any) -> bool:
    """Whether they hold a reference picture too."""
    return has_control(embeds) and isinstance(embeds[KEY], dict) and embeds[KEY].get(REFERENCE) is not None


def control_conditioning(embeds: dict[str, Any], sampling: Sampling, config: WanConfig) -> dict[str, Tensor]:
    """`image_conditioning`, the channels behind the latents [n, T, h, w], and `reference_latent` [16, h, w].

    Args:
        embeds: of which `has_control` is so.
    Raises:
        ValueError: in the user's words, if they cannot be used.
    """
    import torch

    variant, channels = config.variant, config.out_dim
    if CONTROL not in variant.image:
        raise ValueError(
            f"image_embeds carries {KEY}, which this model ({variant.name}) does not follow; choose a Fun-Control "
            "model, or take out the node that adds them"
        )
    held = embeds[KEY]
    if not isinstance(held, dict):
        raise ValueError(f"{KEY} of image_embeds is {kind_of(held)}; it must be that of WanVideoControlEmbeds")
    known = {IMAGES, REFERENCE, *WHOLE, *CAMERA}
    if other := [key for key, value in held.items() if key not in known and value is not None and value is not False]:
        raise ValueError(
            f"{KEY} of image_embeds carries {listed(sorted(other, key=str))}, which this node does not support"
        )
    for key, neutral in WHOLE.items():
        share = held.get(key, neutral)
        allowed = f"{neutral:g}: every step follows the control here"
        check(share == neutral, f"{key} of {KEY} of image_embeds", share, allowed)
    shape = variant.latents.shape(sampling.width, sampling.height, sampling.num_frames)
    parts = {
        CONTROL: _volume(held.get(IMAGES), f"{IMAGES} of {KEY}", channels, sampling, variant.latents.stride),
        PICTURE: _volume(
            embeds.get("image_embeds"), "image_embeds of image_embeds", channels, sampling, variant.latents.stride
        ),
        MASK: _volume(embeds.get("mask"), "mask of image_embeds", TEMPORAL_STRIDE, sampling, variant.latents.stride),
    }
    if parts[MASK] is not None and MASK not in variant.image:
        raise ValueError(
            f"image_embeds carries a mask, which this model ({variant.name}) has no channels for; connect {KEY} to "
            "WanVideoImageToVideoEncode, which then makes none"
        )
    filled = []
    for name in variant.image:
        part = parts[name]
        size = TEMPORAL_STRIDE if name == MASK else channels
        filled.append(torch.zeros(size, *shape[1:]) if part is None else part)
    found = {"image_conditioning": torch.cat(filled).contiguous()}
    if held.get(REFERENCE) is not None:
        found[REFERENCE_LATENT] = _reference(held[REFERENCE], config)
    return found


def _volume(value: Any, name: str, channels: int, sampling: Sampling, stride: int) -> Tensor | None:
    if value is None:
        return None
    allowed = f"a tensor [{channels}, T, h, w]"
    tensor = tensor_of(value, name, allowed, mask=channels == TEMPORAL_STRIDE).float()
    if tensor.ndim != 4 or tensor.shape[0] != channels or 0 in tensor.shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be {allowed}")
    check_video_size(name, tensor.shape[1:], stride, sampling)
    return tensor


def _reference(value: Any, config: WanConfig) -> Tensor:
    if REFERENCE_LATENT not in config.variant.takes:
        raise ValueError(
            f"{KEY} of image_embeds carries {REFERENCE}, which this model ({config.variant.name}) does not take; "
            f"choose a {takers(REFERENCE_LATENT)} model, or disconnect it"
        )
    allowed, first = f"a tensor [1, {config.out_dim}, h, w]", (1, config.out_dim)
    name = f"{REFERENCE} of {KEY}"
    latent = tensor_of(value, name, allowed).float()
    if latent.ndim != 4 or tuple(latent.shape[:2]) != first or 0 in latent.shape:
        raise ValueError(f"{name} has shape {list(latent.shape)}; it must be {allowed}")
    return latent[0].contiguous()
