"""A user's picture -> what CLIP looks at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.config import CLIP_PICTURE

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of red, green and blue; OpenAI's CLIP (Radford et al., 2021)."""


def fit_clip_picture(image: Tensor) -> Tensor:
    """The whole picture, stretched to CLIP's square, as Wan's own code does it: bicubic, without antialiasing.

    ComfyUI's CLIP Vision Encode antialiases, rounds to 8 bits and, unless its crop is none, cuts the sides off. A
    picture of 224 x 224 in 8 bits is the same for all three.

    Args:
        image: [H, W, 3] in 0 to 1, as ComfyUI's IMAGE.
    Returns:
        [3, 224, 224], float32, less the mean, in standard deviations.
    """
    if image.dim() != 3 or image.shape[-1] != 3:
        raise ValueError(f"the image has shape {list(image.shape)}; it must be [H, W, 3]")
    picture = image.float().cpu().permute(2, 0, 1)
    if picture.shape != CLIP_PICTURE:
        picture = F.interpolate(picture[None], size=CLIP_PICTURE[1:], mode="bicubic")[0]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (picture - mean) / std
