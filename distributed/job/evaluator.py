"""What a sampler that runs elsewhere, as ComfyUI's own, asks of a group of processes: evaluations of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from .job import ForwardsJob

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
"""Of the dtypes that tensors between ComfyUI and the ranks have."""
MAX_CONTROL_BYTES = 2 << 30
"""Of all that one sample is told of a kind."""
KEPT_ROW_BYTES, KEPT_VOLUME_BYTES = 1 << 30, 4 << 30
"""Of what is rows, and of what has frames, that stay known in a sampling and so are sent once: a video in context
windows has a control for each of them."""
KEPT_AT_LEAST = 1 << 20
"""Bytes that each of them counts as, so that their number has a bound, too."""


@dataclass(frozen=True, slots=True, eq=False)
class SampleTold:
    """One tensor of those that a sample is told of a kind (`wan.sampling.told`)."""

    values: Tensor
    """Float32, on the CPU: [channels, frames, rows, columns] of its kind, normalised where it is of latents; what CLIP
    sees: [257 or 514, clip_dim]."""
    strength: float = 1.0
    """1 but of a kind that has strengths."""


@dataclass(frozen=True, slots=True, eq=False)
class SampleConditioning:
    """What one sample of a batch is conditioned on. A tensor that is the same is the same object from call to call."""

    text: Tensor
    """[n, text_dim], float32 or bfloat16, on the CPU. Attended to as it is, neither padded nor cut to the 512 rows of
    the official code: ComfyUI's text encoder has done what is done, and its model takes any number."""
    told: Mapping[str, tuple[SampleTold, ...]] = field(default_factory=dict)
    """Kind -> what the sample is told of it, in order. Of frames that a kind puts in front nothing is evaluated."""
    conditional: bool = True
    """Of the prompt; off: of the negative prompt. It decides only who computes it."""


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
