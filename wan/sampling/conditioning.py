"""What a video starts from and is conditioned on: noise, given latents, pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.variants import Variant
from ..transformer.conditions import NONE, Conditions, made
from ..transformer.context import Context
from ..transformer.part import Part
from ..transformer.reference import Reference
from ..vae.latents import normalise
from .control import build_controls
from .denoise import noised
from .image_channels import Encode, Given, image_channels
from .told import KINDS, Size


@dataclass(frozen=True, slots=True)
class Conditioning:
    """All in the diffusion model's scale, float32."""

    latents: Tensor
    """[C, T, h, w], at the noise level of the first step."""
    conditions: Conditions = NONE
    known: Tensor | None = None
    """[C, T, h, w]: latents that stay where `known_mask` says so."""
    known_mask: Tensor | None = None
    """[T, h, w], bool."""


def start_latents(noise: Tensor, samples: Tensor | None, *, sigma: float, add_noise: bool) -> Tensor:
    """[C, T, h, w] at noise level `sigma`.

    Args:
        samples: normalised latents to start from; None: the noise as it is, at whatever `sigma` a solver starts.
        add_noise: False for `samples` that still hold the noise of that level.
    """
    if samples is None:
        return noise
    return noised(samples, noise, sigma) if add_noise else samples


def first_frame_known(latents: Tensor, picture: Tensor, encode: Encode) -> tuple[Tensor, Tensor]:
    """TI2V: the picture [3, H, W] as latent frame 0 of [C, T, h, w], and the mask of it [T, h, w]."""
    known = torch.zeros_like(latents)
    known[:, :1] = encode(picture[None, :, None])[0].to(known)
    mask = torch.zeros(latents.shape[1:], dtype=torch.bool)
    mask[0] = True
    return known, mask


def build_conditioning(
    inputs: dict[str, Tensor],
    noise: Tensor,
    *,
    variant: Variant,
    num_frames: int,
    sigma: float,
    add_noise: bool,
    encode: Encode,
) -> Conditioning:
    """Puts together what came with a job.

    Args:
        inputs: start_image and end_image [3, H, W] in -1 to 1; image_conditioning, the channels behind the latents,
            [n, T, h, w]; clip_features [257 or 514, clip_dim]; control_video [3, F, H, W] and reference_images
            [1, 3, H, W] in -1 to 1, or reference_latent [C, h, w]; camera_conditions [24, T, H, W]; pose_video_latent
            [C, P, h, w]; face_video_pixels and face_video_pixels_null [3, F, 512, 512] in -1 to 1; those of VACE
            (control.py); samples [C, T, h, w], un-normalised; noise_mask [T, h, w], 1 where latents are made. All may
            be absent.
        noise: [C, T, h, w].
        variant: of the model.
        sigma: noise level of the first step.
    """
    start, end, samples = (inputs.get(name) for name in ("start_image", "end_image", "samples"))
    if samples is not None:
        samples = normalise(samples, samples.shape[0])
    latents = start_latents(noise, samples, sigma=sigma, add_noise=add_noise)
    known: tuple[Tensor, ...] = ()
    if variant.known_frames and start is not None:
        known = first_frame_known(latents, start, encode)
    elif samples is not None and "noise_mask" in inputs:
        known = samples, inputs["noise_mask"] < 0.5
    conditions = NONE
    if variant.image_channels:
        image = inputs.get("image_conditioning")
        if image is None:
            channels, frames, height, width = noise.shape
            given = Given(
                start=start, end=end, control=inputs.get("control_video"), num_frames=num_frames,
                shape=(channels, frames, height, width), encode=encode,
            )  # fmt: skip
            image = image_channels(variant, given)
        picture = Context(inputs["clip_features"]) if "clip_features" in inputs else None
        told, instead = _told(inputs, tuple(noise.shape[1:]), variant)
        conditions = Conditions(
            image=image, picture=picture, reference=_reference(inputs, encode), instead=instead, **told
        )
    elif variant.controlled:
        frames, height, width = num_frames, *(side * variant.latents.stride for side in noise.shape[2:])
        conditions = Conditions(controls=build_controls(inputs, (frames, height, width), encode))
    return Conditioning(latents, conditions, *known)


def _told(inputs: dict[str, Tensor], latents: Size, variant: Variant) -> tuple[dict[str, Any], dict[str, Part | None]]:
    """Kind -> what a job's tensors hold of it, and what they do for the negative prompt where that is told another."""
    told: dict[str, Any] = {}
    instead: dict[str, Part | None] = {}
    for kind in KINDS.values():
        held = [
            made(kind.name, inputs[name], latents, variant.latents.stride) if name in inputs else None
            for name in kind.tensors
        ]
        if any(part is not None for part in held):
            told[kind.name] = held[0]
            instead |= dict(zip([kind.name], held[1:], strict=False))
    return told, instead


def _reference(inputs: dict[str, Tensor], encode: Encode) -> Reference | None:
    if "reference_latent" in inputs:
        return Reference(inputs["reference_latent"][:, None])
    if "reference_images" in inputs:
        (picture,) = inputs["reference_images"]
        return Reference(encode(picture[None, :, None])[0].float().cpu())
    return None
