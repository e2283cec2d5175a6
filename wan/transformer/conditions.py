"""What a video is made from beside noise and text, whichever way it comes to the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.patch import patchify, token_grid, unpatchify
from .animate import Face, Pose
from .camera import Camera
from .context import Context
from .part import Part, Split
from .reference import Reference
from .vace import Control


def made(kind: str, values: Tensor, latents: tuple[int, ...], stride: int) -> Part:
    """Of one sample.

    Args:
        kind: name of a row of `wan.sampling.told`, with the shape of its tensor.
        latents: frames, rows and columns of what is evaluated.
        stride: pixels per latent row and column.
    """
    return _MADE[kind](values, latents, stride)


_MADE: Mapping[str, Callable[[Tensor, tuple[int, ...], int], Part]] = {
    "picture": lambda values, latents, stride: Context(values),
    "controls": lambda values, latents, stride: Control(values),
    "reference": lambda values, latents, stride: Reference(values),
    "camera": lambda values, latents, stride: Camera(values, stride),
    "pose": lambda values, latents, stride: Pose(values),
    "face": lambda values, latents, stride: Face(values, latents[0]),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """What the model reads beside a rank's tokens and the text, for one expert: of each row of `wan.sampling.told`."""

    picture: Context | None = None
    """CLIP features of pictures, [257 for each, clip_dim], the first frame's first."""
    controls: tuple[Control, ...] = ()
    """Of VACE."""
    reference: Reference | None = None
    """In front of the video."""
    camera: Camera | None = None
    pose: Pose | None = None
    face: Face | None = None


NOTHING = Beside()


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions(Beside):
    """The same of a whole video, or of a rank's tokens of it, for any expert."""

    image: Tensor | None = None
    """Further input channels: as large as the video's latents, [C, T, h, w], or tokens of them, [S, 4 * C]. Float32."""
    instead: Mapping[str, Part | None] = field(default_factory=dict)
    """Kind -> what is in its place with the negative prompt."""

    @property
    def frames_in_front(self) -> int:
        """Latent frames of the sequence that are none of what is sampled."""
        return int(self.reference is not None)

    def grid(self, latents_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Tokens per axis of the whole sequence. latents_shape: [C, T, h, w] of what is sampled."""
        frames, rows, columns = token_grid(latents_shape)
        return frames + self.frames_in_front, rows, columns

    def tokens(self, latents: Tensor) -> Tensor:
        """[C, T, h, w] -> [L, 4 * C] of the whole sequence: zeros where something else is in front."""
        return patchify(F.pad(latents, (0, 0, 0, 0, self.frames_in_front, 0)))

    def latents(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """What `tokens` made of, back again. grid: that of the whole sequence."""
        return unpatchify(tokens, grid)[:, self.frames_in_front :]

    def on_rank(self, split: Split, length: int, device: torch.device) -> Conditions:
        """split: [length, C] of the whole sequence -> the rank's [S, C]."""

        def here(part: Part) -> Part:
            return part.on_rank(split, length).on_device(device)

        image = None if self.image is None else split(self.tokens(self.image)).to(device)
        instead = {kind: None if part is None else here(part) for kind, part in self.instead.items()}
        return replace(self, image=image, instead=instead, **self._each(here))

    def besides(self, *, keep: bool) -> dict[bool, Beside]:
        """Conditional? -> for one expert, on a rank. What both prompts are told is the same.

        Args:
            keep: what is derived stays between steps.
        """
        told = self._each(lambda part: part.for_expert(keep=keep))
        instead = {kind: None if part is None else part.for_expert(keep=keep) for kind, part in self.instead.items()}
        return {True: Beside(**told), False: Beside(**{**told, **instead})}

    def beside(self, *, keep: bool) -> Beside:
        """`besides` of the prompt."""
        return self.besides(keep=keep)[True]

    def _each(self, change: Callable[[Part], Part]) -> dict[str, Any]:
        """Kind -> what becomes of what is told of it."""
        found: dict[str, Any] = {}
        for kind in (one.name for one in fields(Beside)):
            told = getattr(self, kind)
            if isinstance(told, tuple):
                found[kind] = tuple(change(part) for part in told)
            else:
                found[kind] = None if told is None else change(told)
        return found


NONE = Conditions()
