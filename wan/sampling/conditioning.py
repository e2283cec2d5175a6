"""What a video starts from and is conditioned on: noise, given latents, pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.latent_space import TEMPORAL_STRIDE
from ..model.variants import Variant
from ..transformer.conditions import NONE, Conditions
from ..vae.latents import normalise
from .control import Encode, build_controls
from .denoise import noised


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


def image_channels(
    start: Tensor | None, end: Tensor | None, num_frames: int, shape: tuple[int, int, int], encode: Encode
) -> Tensor:
    """I2V: [4 + C, T, h, w] from the first and last picture [3, H, W], for latents of `shape` (T, h, w)."""
    latents = encode(image_frames(start, end, num_frames))[0]
    mask = image_mask(shape, start=start is not None, end=end is not None)
    return torch.cat((mask, latents.float().cpu()))


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
        inputs: start_image and end_image [3, H, W] in -1 to 1; image_conditioning [4 + C, T, h, w]; clip_features
            [257 or 514, clip_dim]; those of VACE (control.py); samples [C, T, h, w], un-normalised; noise_mask
            [T, h, w], 1 where latents are made. All may be absent.
        noise: [C, T, h, w].
        variant: of the model.
        sigma: noise level of the first step.
    """
    start, end, samples = (inputs.get(name) for name in ("start_image", "end_image", "samples"))
    if samples is not None:
        samples = normalise(samples, samples.shape[0])
    latents = start_latents(noise, samples, sigma=sigma, add_noise=add_noise)
    if variant.image_channels:
        image = inputs.get("image_conditioning")
        if image is None:
            frames, height, width = noise.shape[1:]
            image = image_channels(start, end, num_frames, (frames, height, width), encode)
        return Conditioning(latents, Conditions(image=image, picture=inputs.get("clip_features")))
    if variant.controlled:
        frames, height, width = num_frames, *(side * variant.latents.stride for side in noise.shape[2:])
        return Conditioning(latents, Conditions(controls=build_controls(inputs, (frames, height, width), encode)))
    if start is not None:
        return Conditioning(latents, NONE, *first_frame_known(latents, start, encode))
    if "noise_mask" in inputs:
        return Conditioning(latents, NONE, samples, inputs["noise_mask"] < 0.5)
    return Conditioning(latents)


def image_frames(start: Tensor | None, end: Tensor | None, num_frames: int) -> Tensor:
    """The video that an I2V model's image latents are encoded from: mid grey where no picture is given.

    Args:
        start, end: first and last frame [3, H, W] in -1 to 1; at least one.
    Returns:
        [1, 3, num_frames, H, W]
    """
    given = start if start is not None else end
    assert given is not None
    frames = torch.zeros(1, 3, num_frames, *given.shape[1:])
    if start is not None:
        frames[0, :, 0] = start
    if end is not None:
        frames[0, :, -1] = end
    return frames


def image_mask(shape: tuple[int, int, int], *, start: bool, end: bool) -> Tensor:
    """Which frames are given: [4, T, h, w] of 1 (given) and 0, for latents of `shape` (T, h, w).

    Channel c of latent frame t speaks of frame 4 * t - 3 + c; the first frame fills the four channels of latent
    frame 0.
    """
    mask = torch.zeros(TEMPORAL_STRIDE, *shape)
    if start:
        mask[:, 0] = 1
    if end:
        mask[-1, -1] = 1
    return mask
