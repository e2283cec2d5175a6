"""What the kinds of things that a model is told (`wan.sampling.told`) have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Self

import torch
from torch import Tensor

Split = Callable[[Tensor], Tensor]
"""[length, C] of the whole sequence -> the rank's [S, C]."""


class Part(Protocol):
    """One of them, of one sample."""

    def on_rank(self, split: Split, length: int) -> Self:
        """What one rank needs of it, in the host's memory, and no part of the memory of the whole."""

    def on_device(self, device: torch.device) -> Self:
        """With what every evaluation reads there."""

    def for_expert(self, *, keep: bool) -> Self:
        """With a place of its own for what one expert derives of it. keep: that stays between steps."""

    def device_bytes(self) -> int:
        """Of what it holds on the device, with what has been derived of it."""


def bytes_of(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def places(split: Split, length: int) -> Tensor:
    """[S] int64: which token of the sequence each of the rank's is; what fills a rank up is -1."""
    return split(torch.arange(1, length + 1)[:, None])[:, 0] - 1
