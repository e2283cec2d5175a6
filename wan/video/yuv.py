"""Frames as encoders take them: BT.709 in the range of television, chroma at half the size (YUV 4:2:0 and 4:2:2)."""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

RED, BLUE = 0.2126, 0.0722
"""BT.709's shares of luma; the rest is green's."""
TAPS = (-0.0140625, -0.0421875, 0.1203125, 0.4359375, 0.4359375, 0.1203125, -0.0421875, -0.0140625)
"""Rows i - 3 to i + 4 of chroma at full height -> row i / 2 at half of it: the bicubic filter (b 0, c 0.6) that ffmpeg
reduces with. Columns are averaged in pairs, as there."""


def frames_to_yuv(frames: Tensor, *, bits: int = 8, halve_rows: bool = True) -> Tensor:
    """Frames [3, n, H, W] in [-1, 1], H and W even -> [n, rows, W], on the same device, rounded once.

    Each frame is ffmpeg's yuv420p: H rows of luma, then blue's chroma in H/4 rows of W, two of its own rows in each,
    then red's. Without `halve_rows` it is yuv422p: H/2 rows of W for either chroma.

    Args:
        bits: of a sample; uint8 for 8, int16 for more.
    """
    if frames.dim() != 4 or frames.shape[0] != 3 or frames.shape[2] % 2 or frames.shape[3] % 2:
        raise ValueError(f"frames have shape {list(frames.shape)}; it must be [3, n, H, W] with even H and W")
    red, green, blue = frames.float().clamp(-1.0, 1.0).unbind(0)
    luma = RED * red + (1 - RED - BLUE) * green + BLUE * blue
    chroma = torch.stack([(blue - luma) / (2 - 2 * BLUE), (red - luma) / (2 - 2 * RED)], dim=1)
    chroma = F.avg_pool2d(chroma, (1, 2))
    height, width = luma.shape[1:]
    if halve_rows:
        chroma = F.pad(chroma, (0, 0, 3, 3), mode="replicate")
        chroma = reduce(torch.add, (tap * chroma[:, :, row : row + height : 2] for row, tap in enumerate(TAPS)))
    # Luma takes 16 to 235, chroma 16 to 240, and a little more where the filter overshoots.
    levels = torch.cat([(125.5 + 109.5 * luma).flatten(1), (128.0 + 112.0 * chroma).flatten(1)], dim=1)
    scale = 2 ** (bits - 8)
    levels = levels.mul_(scale).round_().clamp_(0.0, 256.0 * scale - 1)
    return levels.to(torch.uint8 if bits == 8 else torch.int16).view(len(luma), -1, width)


def frames_to_rgb(frames: Tensor) -> Tensor:
    """Frames [3, n, H, W] in [-1, 1] -> [n, H, W, 3] uint8, on the same device, rounded once: ffmpeg's rgb24."""
    levels = (frames.float().clamp(-1.0, 1.0) + 1.0).mul_(127.5).round_()
    return levels.to(torch.uint8).permute(1, 2, 3, 0).contiguous()
