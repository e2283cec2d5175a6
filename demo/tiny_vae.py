"""Wan's video VAEs in small, with random weights that are smooth, so that their pictures are. Official tensor names."""

from __future__ import annotations

import torch
from torch import Tensor

from ..wan.model.latent_space import WAN21, WAN22, LatentSpace
from ..wan.vae.vae_keys import module_names
from .official_names import under_official_names

BASE_DIM = 8


def vae(seed: int, kind: LatentSpace = WAN21) -> dict[str, Tensor]:
    """The VAE of these latents."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    options = {"base_dim": BASE_DIM, "z_dim": kind.channels}
    if kind == WAN22:
        options |= {"decoder_base_dim": BASE_DIM, "is_residual": True, "in_channels": 12, "out_channels": 12}
        options |= {"patch_size": 2, "scale_factor_spatial": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoencoderKLWan(**options)
    named = under_official_names(model.state_dict(), module_names(kind))
    weights = {name: _smooth(tensor) for name, tensor in named.items()}
    for name in (name for name in weights if name.startswith("decoder.") and "time_conv" in name):
        # One half of the channels makes the earlier, the other the later of two frames; alike, they do not flicker.
        early, late = weights[name].chunk(2)
        weights[name] = torch.cat([early, 0.8 * early + 0.2 * late])
    return weights


def _smooth(weight: Tensor) -> Tensor:
    """Gives every 3x3 kernel of a convolution the same smooth shape, at its own strength."""
    if weight.ndim < 4 or weight.shape[-2:] != (3, 3):
        return weight.contiguous()
    blur = torch.tensor([0.25, 0.5, 0.25])
    # The mean of nine random values is a third as large as one of them.
    strength = 3 * weight.mean((-2, -1), keepdim=True)
    return (9**0.5 * strength * torch.outer(blur, blur)).contiguous()
