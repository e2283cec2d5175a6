"""A small picture of latents, by the linear map that comes closest to what their VAE makes of them.

Decoding would take as long as many steps; a linear map takes a millisecond and shows layout and colours. The map is
fitted by least squares, on pictures that the VAE itself encodes and decodes, so it is right for any VAE.

C = latent channels, h and w = latent rows and columns, n = preview pixels per latent position and axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.latent_space import LATENT_SPACES, TEMPORAL_STRIDE

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

PIXELS = 4
"""Of the video, per preview pixel and axis."""
TRAINING_POSITIONS = 16
"""Latent rows and columns of the picture that the map is fitted on."""
TRAINING_FRAMES = 5
"""Two latent frames: the first of a video stands for one frame, every other for four."""
RIDGE = 1e-3
"""Mean square of a latent channel that weighs as much as the wish for a small map."""


@dataclass(frozen=True, slots=True)
class PreviewMap:
    """Latents of one frame -> RGB."""

    weight: Tensor
    """[C + 1, 3 * n * n], float32, on the CPU; the last row is the constant."""

    def picture(self, latents: Tensor) -> Tensor:
        """[C, h, w], normalised -> [h * n, w * n, 3], uint8, on the CPU."""
        flat = self.weight.T @ _rows(latents.float().cpu()[:, None]).T
        n = math.isqrt(self.weight.shape[1] // 3)
        pixels = F.pixel_shuffle(flat.view(-1, *latents.shape[1:]), n)
        # Latents that are not finite are the decoder's to complain about.
        return ((pixels.nan_to_num() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0)


def fit_preview(latents: Tensor, frames: Tensor, stride: int) -> PreviewMap:
    """The map with the least mean square error.

    Args:
        latents: [C, T, h, w], normalised.
        frames: [3, T, H, W] in [-1, 1], one for each latent frame; H = h * stride, W = w * stride.
    """
    assert frames.shape[1] == latents.shape[1], f"{frames.shape[1]} frames for {latents.shape[1]} latent frames"
    rows = _rows(latents.double().cpu())
    small = F.avg_pool2d(frames.double().cpu().transpose(0, 1), PIXELS)
    cells = F.pixel_unshuffle(small, stride // PIXELS)
    target = cells.permute(0, 2, 3, 1).reshape(rows.shape[0], -1)
    gram = rows.T @ rows
    # Normalised latents have a mean square of one.
    gram += RIDGE * len(rows) * torch.eye(len(gram), dtype=gram.dtype)
    return PreviewMap(torch.linalg.solve(gram, rows.T @ target).float())


def preview_of_vae(vae: AutoencoderKLWan) -> PreviewMap:
    """Fits the map of a VAE: one encoding of five small frames and one decoding of thirteen."""
    from .autoencoder import decode_frames, encode, upscale

    stride = LATENT_SPACES[vae.config["z_dim"]].stride
    pictures = encode(vae, training_video(TRAINING_POSITIONS * stride))
    # The early steps' estimates are no picture's latents yet, so smooth noise belongs to what is fitted.
    latents = torch.cat([pictures, smooth_noise(pictures)], dim=2)
    # Of each latent frame the last one that it stands for; the decoder's parts may hold several.
    frames = torch.cat(list(decode_frames(vae, latents)), dim=1)[:, ::TEMPORAL_STRIDE].float()
    if (scale := upscale(vae)) > 1:
        frames = F.avg_pool2d(frames.transpose(0, 1), scale).transpose(0, 1)
    return fit_preview(latents[0], frames, stride)


def smooth_noise(like: Tensor) -> Tensor:
    """Noise of mean square one that varies over two positions, in the shape of `like`, [1, C, T, h, w]."""
    coarse = [*like.shape[2:3], *(size // 2 for size in like.shape[3:])]
    noise = torch.randn(1, like.shape[1], *coarse, generator=torch.Generator("cpu").manual_seed(1))
    noise = F.interpolate(noise, size=like.shape[2:], mode="trilinear")
    return (noise / noise.square().mean().sqrt()).to(like)


def training_video(size: int) -> Tensor:
    """[1, 3, 5, size, size] in [-1, 1]: a still picture of coloured patches, equally strong at every scale.

    Equal strength per octave is the spectrum of natural pictures (Field, 1987, doi 10.1364/JOSAA.4.002379).
    """
    generator = torch.Generator("cpu").manual_seed(0)
    picture = torch.zeros(1, 3, size, size)
    patches = 2
    while patches * PIXELS <= size:
        colours = torch.randn(1, 3, patches, patches, generator=generator)
        picture += F.interpolate(colours, size=(size, size), mode="nearest")
        patches *= 2
    return torch.tanh(picture / 2)[:, :, None].repeat(1, 1, TRAINING_FRAMES, 1, 1)


def is_due(done: int, total: int) -> bool:
    """Whether a picture is made after `done` of `total` steps: the first, the last, and about ten in all."""
    return done in (1, total) or done % max(1, total // 10) == 0


def _rows(latents: Tensor) -> Tensor:
    """[C, T, h, w] -> [T * h * w, C + 1], the last column 1."""
    rows = latents.flatten(1).T
    return torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
