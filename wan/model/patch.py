"""Latents <-> tokens. A token is one 1x2x2 patch; its features run (row, column, channel), channel fastest.

Sampling happens on tokens: every solver is elementwise, so a rank can keep its part of the sequence
from the first step to the last.
"""

from __future__ import annotations

from torch import Tensor

from .latent_space import PATCH_SIZE


def token_grid(latents_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """[C, T, H, W] -> tokens per axis (T, H/2, W/2). Raises ValueError on an odd height or width."""
    _, frames, height, width = latents_shape
    if height % PATCH_SIZE[1] or width % PATCH_SIZE[2]:
        raise ValueError(f"latents are {height} x {width}; height and width must be even")
    return frames, height // PATCH_SIZE[1], width // PATCH_SIZE[2]


def patchify(latents: Tensor) -> Tensor:
    """[C, T, H, W] -> [T * H/2 * W/2, 4 * C], frame-major, then row, then column."""
    frames, rows, cols = token_grid(tuple(latents.shape))
    _, ph, pw = PATCH_SIZE
    patches = latents.reshape(-1, frames, rows, ph, cols, pw)
    return patches.permute(1, 2, 4, 3, 5, 0).reshape(frames * rows * cols, -1)


def unpatchify(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """[L, 4 * C] -> [C, T, H, W]; L is the product of `grid`."""
    frames, rows, cols = grid
    _, ph, pw = PATCH_SIZE
    patches = tokens.reshape(frames, rows, cols, ph, pw, -1)
    return patches.permute(5, 0, 1, 3, 2, 4).reshape(-1, frames, rows * ph, cols * pw)
