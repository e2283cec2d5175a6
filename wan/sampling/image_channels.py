"""The channels behind a model's latents: which frames are given, a picture, a control video, each where its row has it.

An I2V model's video is encoded whole, grey where no frame is given. Fun models are told of the first frame and of the
control video as what they are encoded to, with zeros behind, as ComfyUI does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.latent_space import TEMPORAL_STRIDE
from ..model.variants import CONTROL, FRAMES, MASK, PICTURE, Variant

Encode = Callable[[Tensor], Tensor]
"""Frames [1, 3, F, H, W] in -1 to 1 -> normalised latents [1, C, T, h, w]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """What a video starts and ends with, and what it follows."""

    start: Tensor | None = None
    """First frame [3, H, W] in -1 to 1."""
    end: Tensor | None = None
    """Last frame, the same."""
    control: Tensor | None = None
    """[3, F, H, W] in -1 to 1; F is 4n + 1, and no more than `num_frames`."""
    num_frames: int
    shape: tuple[int, int, int, int]
    """[C, T, h, w] of the video's latents."""
    encode: Encode

    def mask(self) -> Tensor:
        return image_mask(self.shape[1:], start=self.start is not None, end=self.end is not None)

    def frames(self) -> Tensor:
        if self.start is None and self.end is None:
            return torch.zeros(self.shape)
        return self.encode(image_frames(self.start, self.end, self.num_frames))[0].float().cpu()

    def picture(self) -> Tensor:
        return self._alone(None if self.start is None else self.start[:, None])

    def followed(self) -> Tensor:
        return self._alone(self.control)

    def _alone(self, frames: Tensor | None) -> Tensor:
        """[3, F, H, W] -> [C, T, h, w]: what it is encoded to, and zeros behind."""
        latents = torch.zeros(self.shape)
        if frames is not None:
            encoded = self.encode(frames[None])[0].float().cpu()
            latents[:, : encoded.shape[1]] = encoded
        return latents


CHANNELS: Mapping[str, Callable[[Given], Tensor]] = {
    MASK: Given.mask, FRAMES: Given.frames, CONTROL: Given.followed, PICTURE: Given.picture
}  # fmt: skip
"""Name in `Variant.image` -> what makes those channels."""


def image_channels(variant: Variant, given: Given) -> Tensor:
    """[channels behind the latents, T, h, w], as the variant's row orders them."""
    return torch.cat([CHANNELS[name](given) for name in variant.image])


def image_frames(start: Tensor | None, end: Tensor | None, num_frames: int) -> Tensor:
    """The video that an I2V model's image latents are encoded from: mid grey where no picture is given.

    Args:
        start, end: first and last frame [3, H, W] in -1 to 1; at least one.
    Returns:
        [1, 3, num_frames, H, W]
    """
    given = start if start is not None else end
    assert given is not None
    frames = torch.zeros(1, 3, num_frames, *given.shape[1:])
    if start is not None:
        frames[0, :, 0] = start
    if end is not None:
        frames[0, :, -1] = end
    return frames


def image_mask(shape: tuple[int, int, int], *, start: bool, end: bool) -> Tensor:
    """Which frames are given: [4, T, h, w] of 1 (given) and 0, for latents of `shape` (T, h, w).

    Channel c of latent frame t speaks of frame 4 * t - 3 + c; the first frame fills the four channels of latent
    frame 0.
    """
    mask = torch.zeros(TEMPORAL_STRIDE, *shape)
    if start:
        mask[:, 0] = 1
    if end:
        mask[-1, -1] = 1
    return mask
