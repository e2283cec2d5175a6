"""VACE's control: a video, what of it is made anew, and reference pictures -> the 96 channels that the model takes.

Of the frames, what is kept and what is made anew is encoded apart, each with mid grey where the other is; the mask
follows as it is, 8x8 pixels to a latent pixel's 64 channels. A reference picture is a latent frame in front. As the
official code (Wan2.1, vace).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.latent_space import WAN21
from ..transformer.vace import Control
from .image_channels import Encode

GREY = 0.0
"""Of frames that are not given: they are made anew."""


def build_controls(inputs: Mapping[str, Tensor], size: tuple[int, int, int], encode: Encode) -> tuple[Control, ...]:
    """All that came with a job.

    Args:
        inputs: vace_context [n, 96, R + T, h, w] and vace_strength [n]; or control_video [3, F, H, W] in -1 to 1,
            control_mask [F, H, W] (1: made anew) and reference_images [R, 3, H, W]. All may be absent.
        size: frames, height and width of the video in pixels.
    """
    strengths = inputs["vace_strength"].tolist() if "vace_strength" in inputs else [1.0]
    if "vace_context" in inputs:
        return tuple(Control(*pair) for pair in zip(inputs["vace_context"], strengths, strict=True))
    video, mask = inputs.get("control_video"), inputs.get("control_mask")
    if video is None:
        video = torch.full((3, *size), GREY)
    if mask is None:
        mask = torch.ones(size)
    return (Control(control_latents(video, mask, inputs.get("reference_images"), encode), *strengths),)


def control_latents(video: Tensor, mask: Tensor, references: Tensor | None, encode: Encode) -> Tensor:
    """[96, R + T, h, w]; arguments as in `build_controls`. The frames that are encoded are cut off hard, at a half."""
    anew = (mask > 0.5).to(video.dtype)
    kept, made = (encode((video * part)[None])[0].float().cpu() for part in (1 - anew, anew))
    latents = torch.cat((kept, made))
    channels = mask_channels(mask, latents.shape[1])
    for reference in reversed([] if references is None else list(references)):
        known = encode(reference[None, :, None])[0].float().cpu()
        # Nothing of it is made anew. Zeros are no picture: grey would be encoded to something else.
        latents = torch.cat((torch.cat((known, torch.zeros_like(known))), latents), dim=1)
        channels = torch.cat((torch.zeros_like(channels[:, :1]), channels), dim=1)
    return torch.cat((latents, channels))


def mask_channels(mask: Tensor, frames: int) -> Tensor:
    """[F, H, W] -> [64, T, h, w]: channel 8 * row + column of an 8x8 block; the middle one of four frames speaks."""
    stride = WAN21.stride
    blocks = mask.float().unflatten(2, (-1, stride)).unflatten(1, (-1, stride))
    channels = blocks.permute(2, 4, 0, 1, 3).flatten(0, 1)
    return F.interpolate(channels[None], size=(frames, *channels.shape[2:]), mode="nearest-exact")[0]
