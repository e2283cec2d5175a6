"""Encoded clips and their captions, kept on the device, that training draws from and that are drawn anew by and by.

P = clips in the pool, V = captions per clip, R = text rows.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...wan.model.patch import patchify
from ...wan.text.tokenizer import Tokenizer
from .captions import draw_caption
from .loop import autocast, generator
from .sizes import Sizes
from .small_umt5 import NO_TEXT, longest, pad_ids
from .small_vae import encode, grey_behind_first
from .world import FRAMES, HEIGHT, WIDTH, draw_scenes, render

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

LATENTS = (16, (FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)
GRID = (LATENTS[1], LATENTS[2] // 2, LATENTS[3] // 2)
"""Tokens per axis."""
VARIANTS = 2
"""Captions per clip."""
UNTEXTED = 0.1
"""How often a clip's caption is withheld, for guidance (Ho & Salimans, 2022, arXiv 2207.12598)."""


@dataclass(frozen=True, slots=True)
class Batch:
    latents: Tensor
    """[B, 16, T, h, w], float32."""
    ids: Tensor
    """[B, R]."""
    image: Tensor | None
    """[B, 20, T, h, w]: an I2V model's further channels."""


class Pool:
    """What it holds at a step depends on the step alone.

    Args:
        with_image: encode each clip's first frame, too.
    """

    def __init__(
        self, vae: AutoencoderKLWan, tokenizer: Tokenizer, sizes: Sizes, device: torch.device, *, with_image: bool
    ) -> None:
        self._vae, self._tokenizer, self._sizes, self._device = vae, tokenizer, sizes, device
        self._rows = longest(tokenizer)
        self._ages = [-1] * (sizes.pool // sizes.block)
        self._latents = torch.empty(sizes.pool, *LATENTS, dtype=torch.bfloat16, device=device)
        self._image = torch.empty_like(self._latents) if with_image else None
        self._ids = torch.zeros(sizes.pool, VARIANTS, self._rows, dtype=torch.long, device=device)
        self.no_text = pad_ids([tokenizer(text) for text in NO_TEXT], self._rows).to(device)
        """[2, R]: what stands for no caption."""

    @torch.no_grad()
    def batch(self, step: int, count: int, stream: int) -> Batch:
        """`count` clips for a step; different ones for each `stream`."""
        self._bring_to(step)
        random_ = generator(self._device, step, stream)

        def integers(below: int) -> Tensor:
            return torch.randint(below, (count,), generator=random_, device=self._device)

        clip, variant = integers(len(self._latents)), integers(VARIANTS)
        withheld = torch.rand(count, generator=random_, device=self._device) < UNTEXTED
        ids = torch.where(withheld[:, None], self.no_text[integers(len(NO_TEXT))], self._ids[clip, variant])
        image = None
        if self._image is not None:
            frames = self._image[clip].float()
            image = torch.cat((image_mask(frames), frames), dim=1)
        return Batch(self._latents[clip].float(), ids, image)

    def _bring_to(self, step: int) -> None:
        """Draws anew the blocks whose turn it was since the last call: one every `refresh` steps."""
        turns = step // self._sizes.refresh
        for block in range(len(self._ages)):
            age = (turns + len(self._ages) - 1 - block) // len(self._ages)
            if age != self._ages[block]:
                self._ages[block] = age
                self._fill(block, seed=1_000_000 * (block + 1) + age)

    def _fill(self, block: int, seed: int) -> None:
        size = self._sizes.block
        part = slice(block * size, (block + 1) * size)
        scenes = draw_scenes(size, seed)
        rng = random.Random(seed)
        texts = [draw_caption(scene, rng) for scene in scenes for _ in range(VARIANTS)]
        ids = pad_ids([self._tokenizer(text) for text in texts], self._rows)
        self._ids[part] = ids.view(size, VARIANTS, -1).to(self._device)
        clips = render(scenes, self._device)
        with autocast(self._device):
            self._latents[part] = encode(self._vae, clips).to(self._latents.dtype)
            if self._image is not None:
                self._image[part] = encode(self._vae, grey_behind_first(clips)).to(self._latents.dtype)


def image_mask(latents: Tensor) -> Tensor:
    """[B, 16, T, h, w] -> [B, 4, T, h, w]: the first latent frame is given (`wan.sampling.conditioning.image_mask`)."""
    mask = torch.zeros_like(latents[:, :4])
    mask[:, :, 0] = 1
    return mask


def tokens_of(latents: Tensor) -> Tensor:
    """[B, C, T, h, w] -> [B, S, 4 * C]."""
    return torch.vmap(patchify)(latents)
