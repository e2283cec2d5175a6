"""What a sampler that runs elsewhere, as ComfyUI's own, asks of a group of processes: evaluations of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from .job import ForwardsJob


NO_PICTURE = (
    "the model looks at its pictures through CLIP: connect CLIP Vision Encode, with clip_vision_h, to the node that "
    "gives the sampler its picture (clip_vision_output)"
)


ITEM_BYTES = {"float32": 4, "bfloat16": 2}
"""Of the dtypes that tensors between ComfyUI and the ranks have."""
MAX_CONTROLS = 16
"""Of one sample, from a chain of nodes."""
MAX_CONTROL_BYTES = 2 << 30
"""Of all controls of one sample together."""
KEPT_ROW_BYTES, KEPT_VOLUME_BYTES = 1 << 30, 4 << 30
"""Of texts and pictures, and of controls and references, that stay known in a sampling and so are sent once: a video in
context windows has a control for each of them."""
KEPT_AT_LEAST = 1 << 20
"""Bytes that each of them counts as, so that their number has a bound, too."""
NO_CONTROL = "the model is a VACE model: connect WanVaceToVideo between the prompts and the sampler"


@dataclass(frozen=True, slots=True, eq=False)
class SampleControl:
    """One control video of a VACE model."""

    values: Tensor
    """[96, T, h, w], float32, on the CPU: latents of what is kept and what is made anew, normalised, and the mask."""
    strength: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class SampleConditioning:
    """What one sample of a batch is conditioned on. A tensor that is the same is the same object from call to call."""

    text: Tensor
    """[n, text_dim], float32 or bfloat16, on the CPU. Attended to as it is, neither padded nor cut to the 512 rows of
    the official code: ComfyUI's text encoder has done what is done, and its model takes any number."""
    picture: Tensor | None = None
    """[257 or 514, clip_dim], float32, on the CPU: what CLIP sees in the pictures, for a model with an image branch."""
    controls: tuple[SampleControl, ...] = ()
    """At least one for a VACE model, of the latents' frames, rows and columns."""
    conditional: bool = True
    """Of the prompt; off: of the negative prompt. It decides only who computes it."""
    reference: Tensor | None = None
    """[C, 1, h, w], float32, on the CPU: normalised latents of a picture in front of the video, for a model that has a
    place for it. Its frame is none of what is evaluated."""
    camera: Tensor | None = None
    """[24, T, height, width] in pixels, float32, on the CPU: the rays of each pixel, for a model that is told where the
    camera is."""
    pose: Tensor | None = None
    """[C, P, h, w], float32, on the CPU: normalised latents of poses, from the second latent frame on, for a model that
    takes over a pose. At most as many as there are frames for."""
    face: Tensor | None = None
    """[3, F, 512, 512] in -1 to 1, float32, on the CPU: pictures of a face, for a model that takes over a face."""


class Evaluator(Protocol):
    """Evaluates the velocity of one sampling's latents, somewhere else."""

    def evaluate(self, x: Tensor, timesteps: Tensor, samples: Sequence[SampleConditioning]) -> Tensor:
        """One evaluation of a batch of B samples, of any B and any shape from call to call.

        Args:
            x: [B, in_dim, T, h, w], float32, on the CPU; with the channels of a picture where the model has them.
            timesteps: [B], or [B, T] where a video's latent frames differ; float32, 0 to 1000.
            samples: one for each of the batch.
        Returns:
            velocity [B, out_dim, T, h, w], float32, on the CPU.
        Raises:
            JobFailed: the processes failed.
            JobCancelled: the user cancelled.
        """

    def close(self) -> None:
        """The sampling is over, however it ended: the group rests (`keep_warm_seconds`) or ends."""


class EvaluatorSource(Protocol):
    """Where evaluators come from."""

    def open(self, job: ForwardsJob) -> Evaluator:
        """An evaluator for one sampling with the model that the job names."""
