"""Tokens -> the residual stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.latent_space import PATCH_SIZE


class PatchEmbedding(nn.Module):
    """The convolution of a patch with its size as stride, written as a linear layer per token.

    Args:
        patch: 1x2x2, or 2x2 of a single frame.
    """

    def __init__(self, in_dim: int, dim: int, patch: tuple[int, ...] = PATCH_SIZE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, in_dim, *patch))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        # Tokens have their channel fastest (patch.py); the convolution has it slowest.
        weight = self.weight.movedim(1, -1).flatten(1)
        return F.linear(tokens.to(weight.dtype), weight, self.bias)
