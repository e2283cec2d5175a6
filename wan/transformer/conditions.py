"""What a video is made from beside noise and text, whichever way it comes to the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.patch import patchify, token_grid, unpatchify
from .animate import Face, Pose
from .camera import Camera
from .context import Context
from .reference import Reference
from .vace import Control


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """What the model reads beside a rank's tokens and the text, for one expert."""

    picture: Context | None = None
    """CLIP features of the pictures, for a model with an image branch."""
    controls: Sequence[Control] = ()
    """The same tokens of VACE's control videos, [S, 4 * control_dim] each."""
    reference: Reference | None = None
    camera: Camera | None = None
    pose: Pose | None = None
    face: Face | None = None


NOTHING = Beside()


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """What is as large as the video's latents is that, [C, T, h, w], or a rank's tokens of it, [S, 4 * C]. Float32."""

    image: Tensor | None = None
    """Further input channels."""
    picture: Tensor | None = None
    """CLIP features of pictures, [257 for each, clip_dim], the first frame's first."""
    controls: tuple[Control, ...] = ()
    """Of VACE."""
    reference: Reference | None = None
    """In front of the video."""
    camera: Camera | None = None
    pose: Pose | None = None
    face: Face | None = None
    face_null: Face | None = None
    """In its place with the negative prompt."""

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

    def on_rank(self, split: Callable[[Tensor], Tensor], length: int, device: torch.device) -> Conditions:
        """split: [length, C] of the whole sequence -> the rank's [S, C]."""

        def tokens_of(latents: Tensor) -> Tensor:
            return split(self.tokens(latents)).to(device)

        return replace(
            self,
            image=None if self.image is None else tokens_of(self.image),
            picture=None if self.picture is None else self.picture.to(device),
            controls=tuple(Control(tokens_of(control.values), control.strength) for control in self.controls),
            reference=None if self.reference is None else self.reference.on_rank(split, length, device),
            camera=None if self.camera is None else self.camera.on_rank(split, length, device),
            pose=None if self.pose is None else self.pose.on_rank(split, length, device),
            face=None if self.face is None else self.face.on_rank(split, length, device),
            face_null=None if self.face_null is None else self.face_null.on_rank(split, length, device),
        )

    def beside(self, *, keep: bool) -> Beside:
        """For one expert, on a rank. keep: what is derived of pictures stays between steps."""
        return Beside(
            picture=None if self.picture is None else Context(self.picture, keep=keep),
            controls=self.controls,
            reference=self.reference,
            camera=None if self.camera is None else replace(self.camera, keep=keep),
            pose=self.pose,
            face=None if self.face is None else replace(self.face),
        )

    def besides(self, *, keep: bool) -> dict[bool, Beside]:
        """Conditional? -> `beside`; what both prompts have is the same."""
        beside = self.beside(keep=keep)
        null = None if self.face_null is None else replace(self.face_null)
        return {True: beside, False: replace(beside, face=null)}


NONE = Conditions()
