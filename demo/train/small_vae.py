"""Part "vae": Wan2.1's video VAE in small, trained to give back what it is given.

The diffusion model sees latents in the scale of the released VAE's statistics (latents.py), which are no part of a
VAE's file. Training keeps latents near that scale; at the end each channel's own mean and deviation are measured and
folded into the two 1x1x1 convolutions around the latents, which changes no picture.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...wan.model.latent_space import WAN21
from ...wan.vae.autoencoder import decode_frames, load_vae
from ...wan.vae.autoencoder import encode as encode_clip
from ...wan.vae.latents import denormalise, latent_statistics, normalise
from ...wan.vae.vae_keys import module_names
from ..official_names import under_official_names
from .captions import held_out_scenes
from .loop import Budget, autocast, fit, generator
from .sizes import Sizes
from .trained_files import NAMES, place, write
from .world import FRAMES, draw_scenes, render

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

Z_DIM = 16
NOISE = 0.1
"""Added to the latents in training, in deviations: the decoder is to bear what the diffusion model gets wrong."""
SHORT = 5
"""Frames of most training clips: a whole one costs three times as much and shows little more."""
SCALE = 1e-2
"""Weight of the loss that keeps the latents' scale."""


def build(sizes: Sizes, seed: int = 0) -> AutoencoderKLWan:
    """Random weights, with the released VAE's latent statistics."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    mean, std = latent_statistics(Z_DIM)
    vae = AutoencoderKLWan(
        base_dim=sizes.vae_encoder_dim, decoder_base_dim=sizes.vae_decoder_dim, z_dim=Z_DIM,
        latents_mean=list(mean), latents_std=list(std),
    )  # fmt: skip
    _initialise(vae, seed)
    return vae


def _initialise(vae: AutoencoderKLWan, seed: int) -> None:
    """Every frame for itself, so that pictures teach what clips need, residual blocks as identity, and no biases.

    PyTorch's own initialisation shrinks the signal at each convolution without a norm before it and leaves the biases,
    so that all clips have nearly the same latents.
    """
    random_ = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for name, conv in vae.named_modules():
            if not isinstance(conv, nn.Conv2d | nn.Conv3d):
                continue
            conv.weight.zero_()
            conv.bias.zero_()
            leaf = name.rpartition(".")[2]
            if leaf in ("conv2", "proj"):
                continue
            # The last of a causal convolution's taps is the frame itself.
            last = conv.weight[:, :, -1:] if conv.weight.ndim == 5 else conv.weight
            if leaf == "time_conv":
                # One latent frame begins as the last of its frames, and each of two frames as the one it is made of.
                last[:, :, 0, 0, 0] = torch.eye(conv.in_channels).repeat(conv.out_channels // conv.in_channels, 1)
            else:
                last.copy_(torch.randn(last.shape, generator=random_) * last[0].numel() ** -0.5)


def encode(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """[B, 3, F, H, W] in [-1, 1] -> normalised latents [B, 16, T, h, w], float32."""
    vae.clear_cache()
    encoded = vae.quant_conv(_in_two(vae.encoder, clips, vae._enc_feat_map))
    vae.clear_cache()
    return normalise(encoded[:, :Z_DIM], Z_DIM)


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Normalised latents -> clips, float32. Not cut to [-1, 1], which would stop the gradient of what is beyond."""
    vae.clear_cache()
    latents = vae.post_quant_conv(denormalise(latents, Z_DIM))
    clips = _in_two(vae.decoder, latents, vae._feat_map)
    vae.clear_cache()
    return clips.float()


def _in_two(coder: nn.Module, x: Tensor, cache: list[Tensor | None]) -> Tensor:
    """The first frame, then all others at once: what `vae.encode` and `vae.decode` do in as many calls as there are
    latent frames, with the same result."""
    parts = [part for part in x.tensor_split([1], dim=2) if part.shape[2]]
    return torch.cat([coder(part, feat_cache=cache, feat_idx=[0]) for part in parts], dim=2)


def train(folder: Path, sizes: Sizes, budget: Budget, device: torch.device) -> None:
    """Trains it and writes its file."""
    path = place(folder, NAMES.vae)
    vae = load_vae([path], device=device) if path.exists() else build(sizes).to(device)
    vae.requires_grad_(True)
    fit(
        "vae", vae, vae_losses(vae, sizes, device), folder=folder, budget=budget,
        learning_rate=sizes.vae_learning_rate, warm_up=sizes.warm_up,
    )  # fmt: skip
    with torch.no_grad():
        fold_statistics(vae, *measured_statistics(vae, sizes, device))
    write(path, under_official_names(vae.state_dict(), module_names(WAN21)))
    absolute, squared = held_out_error(load_vae([path], device=device))
    print(f"vae: held-out clips: mean absolute error {absolute:.4f}, squared {squared:.5f}", flush=True)


def vae_losses(vae: AutoencoderKLWan, sizes: Sizes, device: torch.device) -> Callable[[int], dict[str, Tensor]]:
    """The losses of a step, for `fit`."""

    def losses(step: int) -> dict[str, Tensor]:
        clips = training_clips(step, sizes, device)
        latents = encode(vae, clips)
        noise = torch.randn(latents.shape, generator=generator(device, step), device=device)
        error = decode(vae, latents + NOISE * noise) - clips
        # Per channel, the divergence of a normal distribution of its mean and variance from the standard one.
        variance, mean = torch.var_mean(latents, (0, 2, 3, 4))
        scale = (mean.square() + variance - 1 - variance.log()).mean() / 2
        return {"reconstruction": ((error.abs() + error.square()) * emphasis(clips)).mean(), "scale": SCALE * scale}

    return losses


def emphasis(clips: Tensor) -> Tensor:
    """[B, 3, F, H, W] -> weights [B, 1, F, H, W] of the pixels, 1 on average: more where a clip is not as it is on
    average. Things are a tenth of a picture; weighted alike, they are learned long after the backgrounds."""
    far = (clips - clips.mean((2, 3, 4), keepdim=True)).abs().mean(1, keepdim=True)
    return (1 + far / far.mean((2, 3, 4), keepdim=True).clamp(min=1e-3)) / 2


def training_clips(step: int, sizes: Sizes, device: torch.device) -> Tensor:
    """[B, 3, F, H, W]: single pictures at first, which teach the most for the least. Then short clips, every fourth
    step whole ones; some are a picture and grey frames behind it."""
    clips = render(draw_scenes(sizes.vae_batch, seed=step), device)
    if step < sizes.vae_pictures:
        frame = step % FRAMES
        return clips[:, :, frame : frame + 1]
    if step % 4 == 3:
        return clips
    first = 4 * (step % 4)
    clips = clips[:, :, first : first + SHORT]
    if step % 4 == 2:
        # What an image-to-video model's conditioning is encoded from.
        half = sizes.vae_batch // 2
        clips = torch.cat((grey_behind_first(clips[:half]), clips[half:]))
    return clips


def grey_behind_first(clips: Tensor) -> Tensor:
    """[B, 3, F, H, W] -> the frames that an I2V model's image latents come from (`wan.sampling.conditioning`)."""
    frames = torch.zeros_like(clips)
    frames[:, :, 0] = clips[:, :, 0]
    return frames


@torch.no_grad()
def held_out_error(vae: AutoencoderKLWan, count: int = 4) -> tuple[float, float]:
    """Mean absolute and mean squared error of whole clips that training never shows, by the pack's own calls."""
    errors = []
    for clip in render(held_out_scenes(count)):
        back = torch.cat(list(decode_frames(vae, encode_clip(vae, clip[None]))), dim=1).cpu()
        errors.append(back - clip)
    error = torch.stack(errors)
    return float(error.abs().mean()), float(error.square().mean())


def measured_statistics(vae: AutoencoderKLWan, sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation [16] of the un-normalised latents of some whole clips."""
    parts = []
    for batch in range(4):
        clips = render(draw_scenes(sizes.vae_batch, seed=-1 - batch), device)
        with autocast(device):
            parts.append(vae.encode(clips).latent_dist.mode().float())
    latents = torch.cat(parts).transpose(0, 1).flatten(1)
    return latents.mean(1), latents.std(1)


def fold_statistics(vae: AutoencoderKLWan, mean: Tensor, std: Tensor) -> None:
    """Makes latents of `mean` and `std` [16] into ones of the released statistics; the decoder undoes it."""
    wanted_mean, wanted_std = (torch.tensor(s, device=mean.device) for s in latent_statistics(Z_DIM))
    factor, into, out = wanted_std / std, vae.quant_conv, vae.post_quant_conv
    # z = (z' - wanted_mean) / factor + mean
    out.bias += out.weight.flatten(1) @ (mean - wanted_mean / factor)
    out.weight /= factor.view(1, -1, 1, 1, 1)
    # The other half of the encoder's output is the logarithm of the variance.
    into.weight[:Z_DIM] *= factor.view(-1, 1, 1, 1, 1)
    into.bias[:Z_DIM] = (into.bias[:Z_DIM] - mean) * factor + wanted_mean
