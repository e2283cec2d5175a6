"""The arithmetic between the VAE's convolutions: plain torch, or fused kernels that compute the same.

Shapes: T = frames, H = rows, W = columns, C = channels. Channels are next to each other in memory, where the fastest
convolutions read them and a norm over them reads whole lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-24
"""Under the mean square times C: the square of what `F.normalize` allows a norm to be at least."""


class Sum(NamedTuple):
    """What a convolution gave and what is still to be added: whoever reads it next adds in the same pass."""

    x: Tensor
    """[T, H, W, C], contiguous."""
    bias: Tensor | None = None
    """[C]."""
    residual: Tensor | None = None
    """Like x."""

    def frames(self, start: int, end: int) -> Sum:
        """A run of the frames, as views."""
        return Sum(self.x[start:end], self.bias, None if self.residual is None else self.residual[start:end])

    def split(self, most: int) -> list[Sum]:
        """Parts of at most that many frames, as even as can be."""
        total = len(self.x)
        parts = -(-total // most)
        bounds = [total * part // parts for part in range(parts + 1)]
        return [self.frames(start, end) for start, end in pairwise(bounds)]

    @staticmethod
    def joined(parts: Iterable[Sum]) -> Sum:
        """One after the other; their bias is the same."""
        xs, biases, residuals = zip(*parts, strict=True)
        return Sum(torch.cat(xs), biases[0], None if residuals[0] is None else torch.cat(residuals))


@dataclass(frozen=True, slots=True)
class VaeOps:
    """One implementation. The functions of `PLAIN` say what each does; others round at most once more or less."""

    add: Callable[[Sum, Tensor | None], Tensor]
    norm: Callable[[Sum, Tensor, Tensor, bool, bool], Tensor]
    upsample: Callable[[Sum, int, Tensor], None]


def add(total: Sum, out: Tensor | None = None) -> Tensor:
    """The sum, [T, H, W, C]. Written into `out`, which may have room around its rows, if one is given."""
    x, bias, residual = total
    if bias is not None:
        x = x + bias
    if residual is not None:
        x = x + residual
    return x if out is None else out.copy_(x)


def norm(total: Sum, weight: Tensor, out: Tensor, silu: bool, keep: bool) -> Tensor:
    """The sum's RMS norm over channels times `weight` [C], then SiLU or not, into `out`, which may have room around it.

    Returns:
        the sum if `keep`; it may lie where `total.x` did. Otherwise what is returned means nothing.
    """
    x = add(total)
    normed = F.rms_norm(x, weight.shape, weight, EPS / weight.numel())
    out.copy_(F.silu(normed) if silu else normed)
    return x


def upsample(total: Sum, of: int, out: Tensor) -> None:
    """Each position becomes 2x2 ones, in `out` [of * T, 2H, 2W, C], which may have room around it.

    Args:
        total: [T, H, W, of * C]; each frame holds `of` frames that follow each other.
    """
    x = add(total)
    x = x.unflatten(-1, (of, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1)
    out.copy_(x.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2))


PLAIN = VaeOps(add, norm, upsample)


def _triton() -> VaeOps:
    from .vae_kernels import vae_ops

    return vae_ops()


VAE_OPS: dict[str, Callable[[], VaeOps]] = {"plain": lambda: PLAIN, "triton": _triton}
"""The names are those of `ops.OPS`."""
