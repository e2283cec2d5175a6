"""What a model may be told of a sample beside its latents and its text: a row for each kind, which all that hand it on
read, from ComfyUI's sampler to a rank.

What a rank makes of it is in `wan.transformer.conditions`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..model.config import FACE_CHANNELS, FACE_SIDE, WanConfig
from ..model.latent_space import TEMPORAL_STRIDE

Size = tuple[int, ...]
"""Frames, rows and columns."""
_AXES: dict[str | int, str] = {"T": "latent frames", "F": "frames", "h": "rows", "w": "columns"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A tensor of each sample, or several."""

    name: str
    """Of its field of `wan.transformer.conditions.Beside`."""
    part: str
    """What a model has that reads it: one of the parts of `wan.model.variants`."""
    channels: Callable[[WanConfig], int]
    what: str
    """For people."""
    sides: tuple[str | int, ...] = ("T", "h", "w")
    """The same: its axes behind the channels, T of latent frames; or a size that it always has."""
    source: str = ""
    """The same: where it comes from, where it must be of the latents' size."""
    cond: str
    """What ComfyUI's transformer calls it."""
    entry: str = ""
    """What ComfyUI's nodes call it in a prompt, where that is one tensor with a batch in front."""
    tensors: tuple[str, ...] = ()
    """Of a job: what holds it in the same form, and what does in its place with the negative prompt."""
    size: Callable[[Size, int], Size] | None = None
    """Of latents, and of the pixels of each of their rows and columns -> its own; None: it is rows of channels."""
    fewer: bool = False
    """There may be nothing of the last frames."""
    most: int = 1
    """Of one sample. Where there may be several, each has a strength."""
    strengths: str = ""
    """What ComfyUI's transformer calls these."""
    needed: str = ""
    """What a model says that reads it and is told nothing; empty: that is no fault."""
    in_front: int = 0
    """Latent frames in front of what is sampled."""

    @property
    def axes(self) -> str:
        """For people: what `sides` count."""
        return ", ".join(_AXES.get(side, str(side)) for side in self.sides)

    @property
    def of_several_sizes(self) -> bool:
        """The same may go with latents of several lengths, as of context windows."""
        return self.fewer or self.in_front > 0

    def shape(self, config: WanConfig, latents: Size) -> tuple[int, ...]:
        """[channels, frames, rows, columns] beside latents of a size, with all frames; not of rows."""
        assert self.size is not None, self.name
        return self.channels(config), *self.size(latents, config.variant.latents.stride)

    def fits(self, shape: tuple[int, ...], latents: Size, stride: int) -> bool:
        """Whether a tensor [channels, frames, rows, columns], or [rows, channels], is of the size that latents ask for.

        Args:
            stride: pixels per latent row and column.
        """
        if self.size is None:
            return len(shape) == 2
        frames, *sides = self.size(latents, stride)
        if len(shape) != 4 or list(shape[2:]) != sides:
            return False
        return shape[1] == frames or (self.fewer and 1 <= shape[1] < frames)


def _latents(latents: Size, stride: int) -> Size:
    return latents


_ROWS = (
    Kind(
        name="picture",
        part="img_emb",
        channels=lambda config: config.clip_dim,
        what="picture as CLIP sees it",
        cond="clip_fea",
        needed="the model looks at its pictures through CLIP: connect CLIP Vision Encode, with clip_vision_h, to the "
        "node that gives the sampler its picture (clip_vision_output)",
    ),
    Kind(
        name="controls",
        part="vace_blocks",
        channels=lambda config: config.control_dim,
        what="VACE control",
        source="take the latents of the same WanVaceToVideo",
        cond="vace_context",
        size=_latents,
        most=16,
        strengths="vace_strength",
        needed="the model is a VACE model: connect WanVaceToVideo between the prompts and the sampler",
    ),
    Kind(
        name="reference",
        part="ref_conv",
        channels=lambda config: config.reference_dim,
        what="reference picture",
        source="take the latents of the node that gives it",
        cond="reference_latent",
        size=lambda latents, stride: (1, *latents[1:]),
        in_front=1,
    ),
    Kind(
        name="camera",
        part="control_adapter",
        channels=lambda config: config.camera_dim // config.variant.latents.stride**2,
        what="camera",
        sides=("T", "height", "width"),
        source="give WanCameraEmbedding and WanCameraImageToVideo the same",
        cond="camera_conditions",
        entry="camera_conditions",
        tensors=("camera_conditions",),
        size=lambda latents, stride: (latents[0], *(side * stride for side in latents[1:])),
    ),
    Kind(
        name="pose",
        part="pose_patch_embedding",
        channels=lambda config: config.out_dim,
        what="pose",
        source="take the latents of the same WanAnimateToVideo",
        cond="pose_latents",
        entry="pose_video_latent",
        tensors=("pose_video_latent",),
        # None in front, where it is shown who it is.
        size=lambda latents, stride: (latents[0] - 1, *latents[1:]),
        fewer=True,
    ),
    Kind(
        name="face",
        part="face_adapter",
        channels=lambda config: FACE_CHANNELS,
        what="face",
        sides=("F", FACE_SIDE, FACE_SIDE),
        source="take the latents of the same WanAnimateToVideo",
        cond="face_pixel_values",
        entry="face_video_pixels",
        tensors=("face_video_pixels", "face_video_pixels_null"),
        size=lambda latents, stride: ((latents[0] - 2) * TEMPORAL_STRIDE + 1, FACE_SIDE, FACE_SIDE),
        fewer=True,
    ),
)
KINDS = {row.name: row for row in _ROWS}
