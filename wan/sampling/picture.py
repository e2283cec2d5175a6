"""A user's picture -> a frame of the video."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.variants import Variant

STRETCHED = 32
"""Pixels: rounding width and height down to whole tokens, as the official code does, changes no side by more."""


def fit_image(image: Tensor, width: int, height: int, variant: Variant) -> Tensor:
    """Scales a picture to cover the frame and cuts off what is over, equally on both sides.

    With the official code's resampling: bicubic without antialiasing for I2V, Lanczos for TI2V. For I2V that code
    chooses a frame of nearly the picture's shape and stretches the picture over it, so nearly that shape is stretched.

    Args:
        image: [H, W, 3] in 0 to 1, as ComfyUI's IMAGE.
    Returns:
        [3, height, width] in -1 to 1, float32.
    """
    if image.dim() != 3 or image.shape[-1] != 3:
        raise ValueError(f"the image has shape {list(image.shape)}; it must be [H, W, 3]")
    rows, cols = image.shape[:2]
    covering = _covering(rows, cols, width, height)
    if variant.image_channels and max(covering[0] - height, covering[1] - width) < STRETCHED:
        covering = height, width
    picture = image.float().cpu().permute(2, 0, 1)
    if covering != (rows, cols):
        picture = _lanczos(picture, covering) if variant.known_frames else _bicubic(picture, covering)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return (picture[:, top : top + height, left : left + width] * 2 - 1).contiguous()


def fit_mask(mask: Tensor, width: int, height: int) -> Tensor:
    """Scales masks [F, H, W] to cover the frame and cuts off what is over, as `fit_image` does to a picture."""
    rows, cols = mask.shape[1:]
    covering = _covering(rows, cols, width, height)
    if covering != (rows, cols):
        mask = F.interpolate(mask[:, None], size=covering, mode="bilinear")[:, 0]
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return mask[:, top : top + height, left : left + width].clamp(0, 1)


def _covering(rows: int, cols: int, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of the smallest picture of a shape that covers the frame."""
    scale = max(width / cols, height / rows)
    return round(rows * scale), round(cols * scale)


def _bicubic(picture: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(picture[None], size=size, mode="bicubic")[0]


def _lanczos(picture: Tensor, size: tuple[int, int]) -> Tensor:
    import numpy as np
    from PIL import Image

    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    resized = Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1) / 255
