"""What a video is made from beside noise and text, whichever way it comes to the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .vace import Control


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """What is as large as the video's latents is that, [C, T, h, w], or a rank's tokens of it, [S, 4 * C]. Float32."""

    image: Tensor | None = None
    """Further input channels: mask (1: given), latents."""
    picture: Tensor | None = None
    """CLIP features of pictures, [257 for each, clip_dim], the first frame's first."""
    controls: tuple[Control, ...] = ()
    """Of VACE."""

    def on_rank(self, tokens_of: Callable[[Tensor], Tensor], device: torch.device) -> Conditions:
        """tokens_of: [C, T, h, w] -> the rank's [S, 4 * C] on the device."""
        return replace(
            self,
            image=None if self.image is None else tokens_of(self.image),
            picture=None if self.picture is None else self.picture.to(device),
            controls=tuple(Control(tokens_of(control.values), control.strength) for control in self.controls),
        )


NONE = Conditions()
