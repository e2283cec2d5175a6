"""A VAE in this process, in the place of a group of processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from wan_pack.wan.vae.autoencoder import decode_frames, encode, load_vae
from wan_pack.wan.vae.latents import denormalise, normalise


class PlainVae:
    """As `core_vae.VideoVae`."""

    def __init__(self, file: Path) -> None:
        self._vae = load_vae([file])
        self.asked: list[tuple[int, ...]] = []
        """Shapes, in order."""
        self.depth = self.blocks = 0

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        self.blocks += not self.depth
        self.depth += 1
        yield
        self.depth -= 1

    def decode(self, latents: Tensor) -> Tensor:
        self.asked.append(tuple(latents.shape))
        parts = [decode_frames(self._vae, normalise(one[None], len(one)), clamp=False) for one in latents]
        return torch.stack([torch.cat(list(part), 1) for part in parts])

    def encode(self, frames: Tensor) -> Tensor:
        self.asked.append(tuple(frames.shape))
        frames = frames[:, :, : (frames.shape[2] - 1) // 4 * 4 + 1]
        found = [encode(self._vae, one[None]) for one in frames]
        return torch.cat([denormalise(one, one.shape[1]) for one in found])
