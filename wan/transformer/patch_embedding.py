"""Tokens -> the residual stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.latent_space import PATCH_SIZE


class PatchEmbedding(nn.Module):
    """The 1x2x2 convolution with stride 1x2x2, written as a linear layer per token."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, in_dim, *PATCH_SIZE))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        # Tokens have their channel fastest (patch.py); the convolution has it slowest.
        weight = self.weight.permute(0, 2, 3, 4, 1).flatten(1)
        return F.linear(tokens.to(weight.dtype), weight, self.bias)
