"""Three-axis rotary position embedding (Su et al., 2021; Wan splits the pairs over frame, row and column)."""

from __future__ import annotations

import torch
from torch import Tensor

THETA = 10000.0


def rope_table(
    grid: tuple[int, int, int],
    head_dim: int,
    *,
    start: int = 0,
    stop: int | None = None,
    device: torch.device | str = "cpu",
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for tokens `start` to `stop` of the sequence.

    Angles are computed in float64 and stored in float32: the rounding is 1e-7, and a table is half of what
    complex128 would take.

    Args:
        grid: tokens per axis (frames, rows, columns).
        head_dim: channels per head, even.
        order: [length] int64, the place in the grid of each token of the sequence; None: that of the grid itself.
    Returns:
        cos, sin, each [stop - start, head_dim / 2]. Tokens past the end of the grid (padding) are not rotated.
    """
    frames, rows, cols = grid
    length = frames * rows * cols
    index = torch.arange(start, length if stop is None else stop, device=device)
    padding = index >= length
    if order is not None:
        index = order.to(device)[index.clamp(max=length - 1)]
    positions = (index // (rows * cols), index // cols % rows, index % cols)
    third = head_dim // 6
    angles = []
    for position, pairs in zip(positions, (head_dim // 2 - 2 * third, third, third), strict=True):
        exponent = torch.arange(pairs, dtype=torch.float64, device=device) / pairs
        angles.append(torch.outer(position.double(), THETA**-exponent))
    angle = torch.cat(angles, dim=1).masked_fill_(padding[:, None], 0.0)
    return angle.cos().float(), angle.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates interleaved channel pairs. x: [S, H, D], float32; cos, sin: [S, D/2]."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)
