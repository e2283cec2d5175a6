"""What tests of the split VAE run on every rank (`ranks.run_ranks`, by way of rank_functions.py)."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from wan_pack.distributed.parallel.split_vae import RankVae
from wan_pack.wan.vae import vae_coder
from wan_pack.wan.vae.autoencoder import decode_frames, encode, load_vae

CPU = torch.device("cpu")


def split_vae_equals_whole(rank: int, world: int, *, models: list[str], heights: list[int]) -> dict[str, Any]:
    """Decoding and encoding over 1 to `world` ranks gives what one rank gives, for every height in latent rows.

    In float64: float32's kernels round by shape.
    Returns, per model, group size and height, the rows that this rank's encoder and decoder were given.
    """
    groups = [dist.new_group(list(range(size))) for size in range(1, world + 1)]
    shares = []
    for model in models:
        whole = load_vae([model], dtype=torch.float64)
        shares.append({})
        for size, height in itertools.product(range(rank + 1, world + 1), heights):
            vae = RankVae([model], dtype=torch.float64, device=CPU, group=groups[size - 1])
            shares[-1][f"{size} {height}"] = _compare_vaes(vae, whole, height, alone=height < size, rank=rank)
    return {"shares": shares}


def _compare_vaes(vae: RankVae, whole: torch.nn.Module, height: int, *, alone: bool, rank: int) -> list[int]:
    """Compares on a made-up picture. Returns the heights that this rank's part of `vae` worked on."""
    generator = torch.Generator().manual_seed(height)
    stride = whole.config.scale_factor_spatial
    latents = torch.randn(1, whole.config.z_dim, 3, height, 3, generator=generator)
    video = torch.rand(1, 3, 5, height * stride, 2 * stride, generator=generator) * 2 - 1
    encoded, decoded = encode(whole, video), torch.cat(list(decode_frames(whole, latents)), dim=1)
    seen = set()

    def watched(cls: type, method: str) -> mock._patch:
        original = getattr(cls, method)

        def watch(coder: object, frames: torch.Tensor, *how: int) -> object:
            seen.add(frames.shape[-2])
            return original(coder, frames, *how)

        return mock.patch.object(cls, method, watch)

    with watched(vae_coder.Encoder, "moments"), watched(vae_coder.Decoder, "frames"):
        for at_once in (1, 100):
            with mock.patch.object(vae_coder, "FRAMES_AT_ONCE", at_once):
                _assert_near(vae.encode(video), encoded)
                parts = list(vae.decode(latents, at_once=at_once))
            if rank == 0:
                _assert_near(torch.cat(parts, dim=1), decoded)
            else:
                assert parts == [None] * len(parts) and (not parts if alone else parts)
    return sorted(seen)


def _assert_near(out: torch.Tensor, expected: torch.Tensor) -> None:
    error = ((out - expected).abs().max() / expected.abs().max()).item()
    assert out.shape == expected.shape and error <= 1e-5, f"{error}: {list(out.shape)}, {list(expected.shape)}"
