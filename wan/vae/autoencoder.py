"""Wan's video VAEs: diffusers' AutoencoderKLWan, loaded from any file users have, decoded some frames at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..files.module_weights import fill
from ..files.stored_model import open_model
from ..model.latent_space import FRAMES_AT_ONCE, TEMPORAL_STRIDE, WAN22
from .latents import denormalise, latent_statistics, normalise
from .vae_coder import Decoder, Encoder
from .vae_input import FrameParts
from .vae_keys import EXPECTED, VaeInfo, module_names, vae_info, vae_weights
from .vae_layers import ImageRows, Tools, WholePicture
from .vae_ops import VAE_OPS

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan


def load_vae(
    files: Sequence[str | Path], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> AutoencoderKLWan:
    """Loads a VAE under official, ComfyUI's or diffusers' names, in any float precision on disk.

    Args:
        files: one .safetensors or .pth (JSON files beside it are ignored: the sizes are read off the tensors).
        dtype: of the weights; float32 as the official code decodes.
    Raises:
        ValueError: naming the file, what it is, and what was expected.
    """
    stored = open_model(files, EXPECTED)
    info = vae_info(stored)
    weights = vae_weights(stored, info)
    vae = _build(info)
    official = {theirs: ours for ours, theirs in module_names(info.kind).items()}
    source = {}
    for name in vae.state_dict():
        module, _, leaf = name.rpartition(".")
        source[name] = f"{official[module]}.{leaf}"
    fill(vae, weights, source, stored.label, dtype=dtype, device=device)
    return vae


@torch.no_grad()
def decode_frames(
    vae: AutoencoderKLWan, latents: Tensor, *, rows: ImageRows | None = None, ops: str = "plain", clamp: bool = True,
    at_once: int = FRAMES_AT_ONCE,
) -> Iterator[Tensor]:  # fmt: skip
    """Decodes some frames after the other, so that the whole video is never held.

    Args:
        latents: [1, z_dim, T, h, w], normalised (as the diffusion model leaves them).
        rows: where h are not all rows of the picture.
        ops: a name in `vae_ops.VAE_OPS`.
        clamp: off: what the VAE makes beyond [-1, 1] is left as it is.
        at_once: frames of the video, at most; fewer take less memory and more time.
    Yields:
        Frames [3, n, H, W] in [-1, 1], in the VAE's dtype and on its device; n varies. All of them together equal
        `vae.decode`.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    if latents.dim() != 5 or latents.shape[0] != 1:
        raise ValueError(f"latents have shape {list(latents.shape)}; it must be [1, {vae.config['z_dim']}, T, h, w]")
    latents = denormalise(latents, vae.config["z_dim"]).to(vae.device, vae.dtype)
    for frames in Decoder(vae, _tools(rows, ops)).frames(latents, at_once):
        if vae.config["patch_size"] is not None:
            frames = unpatchify(frames, patch_size=vae.config["patch_size"])
        elif (scale := upscale(vae)) > 1:
            frames = F.pixel_shuffle(frames.transpose(1, 2), scale).transpose(1, 2)
        yield frames[0].clamp_(-1.0, 1.0) if clamp else frames[0]


@torch.no_grad()
def encode(vae: AutoencoderKLWan, video: Tensor, *, rows: ImageRows | None = None, ops: str = "plain") -> Tensor:
    """Encodes frames to the mean of their latent distribution.

    Args:
        video: [1, 3, F, H, W] in [-1, 1], on any device; F is 4n + 1, H and W are multiples of the VAE's stride.
        rows, ops: as for `decode_frames`.
    Returns:
        [1, z_dim, (F - 1) / 4 + 1, h, w], normalised, float32, on the VAE's device.
    """
    check_video(vae, video)
    parts = FrameParts(video, dtype=vae.dtype, device=vae.device, patch=vae.config["patch_size"])
    moments = Encoder(vae, _tools(rows, ops)).moments(parts)
    return normalise(moments[:, : vae.config["z_dim"]], vae.config["z_dim"])


def _tools(rows: ImageRows | None, ops: str) -> Tools:
    return Tools(WholePicture() if rows is None else rows, VAE_OPS[ops]())


def upscale(vae: AutoencoderKLWan) -> int:
    """Pixels per row and column that the decoder makes for one of the video."""
    return (
        1
        if vae.config["patch_size"] is not None
        else math.isqrt(vae.config["out_channels"] // vae.config["in_channels"])
    )


def check_video(vae: AutoencoderKLWan, video: Tensor) -> None:
    """Raises ValueError if `video` is not [1, 3, 4n + 1, H, W] with H and W multiples of the VAE's spatial stride."""
    stride = vae.config["scale_factor_spatial"]
    if video.dim() != 5 or tuple(video.shape[:2]) != (1, 3):
        raise ValueError(f"the video has shape {list(video.shape)}; it must be [1, 3, F, H, W]")
    frames, height, width = video.shape[2:]
    if frames % TEMPORAL_STRIDE != 1 or height % stride or width % stride:
        raise ValueError(
            f"the video has {frames} frames of {width}x{height}; it must have 4n + 1 frames whose width and height "
            f"are multiples of {stride}"
        )


def _build(info: VaeInfo) -> AutoencoderKLWan:
    # On first use: diffusers takes seconds to import and only workers need it.
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    mean, std = latent_statistics(info.z_dim)
    residual = info.kind == WAN22
    with torch.device("meta"):
        return AutoencoderKLWan(
            base_dim=info.base_dim,
            decoder_base_dim=info.decoder_base_dim,
            z_dim=info.z_dim,
            latents_mean=list(mean),
            latents_std=list(std),
            is_residual=residual,
            in_channels=12 if residual else 3,
            out_channels=12 if residual else 3 * info.upscale**2,
            patch_size=2 if residual else None,
            scale_factor_spatial=info.kind.stride,
        )
