"""One sampling of ComfyUI's, whose evaluations an `Evaluator` computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...distributed.job.evaluator import Evaluator, SampleConditioning
from ..host.exceptions import told_to_comfyui
from .unsupported import check_conds, check_options

if TYPE_CHECKING:
    from torch import Tensor

MOST_TEXTS = 32
"""Different ones that are remembered: a sampling has two, one more for each further prompt."""


class Evaluation:
    """Translates ComfyUI's calls.

    Args:
        start: gives the evaluator; called for the first evaluation only, which a cache may make none.
    """

    def __init__(self, start: Callable[[], Evaluator]) -> None:
        self._start = start
        self._evaluator: Evaluator | None = None
        self._texts: list[Tensor] = []

    def velocity(
        self, x: Tensor, timestep: Tensor, context: Tensor, options: Mapping[str, Any], conds: Mapping[str, Any]
    ) -> Tensor:
        """As `Transformer.velocity`. Raises ValueError for what cannot be done elsewhere."""
        import torch
        from torch.nn.functional import pad

        check_options(options)
        check_conds(conds)
        rows, columns = x.shape[-2:]
        whole = x.detach().to("cpu", torch.float32)
        if rows % 2 or columns % 2:
            # Of an area; ComfyUI's model repeats the other edge.
            whole = pad(whole, (0, columns % 2, 0, rows % 2, 0, 0), mode="circular")
        seen = conds.get("clip_fea")
        pictures = None if seen is None else seen.detach().to("cpu", torch.float32)
        # As ComfyUI's model takes one for all.
        timestep = timestep.expand(x.shape[0], *timestep.shape[1:])
        given = self._samples(context.detach().to("cpu", torch.float32), pictures, x.shape[0], options)
        with told_to_comfyui():
            if self._evaluator is None:
                self._evaluator = self._start()
            velocity = self._evaluator.evaluate(whole.contiguous(), timestep.detach().to("cpu", torch.float32), given)
        return velocity[..., :rows, :columns].to(x.device)

    def close(self) -> None:
        """The sampling is over."""
        if self._evaluator is not None:
            self._evaluator.close()

    def _samples(
        self, context: Tensor, pictures: Tensor | None, count: int, options: Mapping[str, Any]
    ) -> list[SampleConditioning]:
        """What each sample of a batch is conditioned on: ComfyUI stacks prompts, each with all latents of its batch."""
        prompts: Sequence[int] = options.get("cond_or_uncond") or [0]
        if count % len(prompts):
            # A node's wrapper around the model asks for a part of the batch, or for more.
            prompts = [0]
        each = count // len(prompts)
        return [
            SampleConditioning(
                text=self._same(context[i % context.shape[0]]),
                picture=None if pictures is None else self._same(pictures[i % pictures.shape[0]]),
                conditional=prompts[i // each] == 0,
            )
            for i in range(count)
        ]

    def _same(self, text: Tensor) -> Tensor:
        """The same object for the same text: ComfyUI copies it for each call."""
        import torch

        for known in self._texts:
            if known.shape == text.shape and torch.equal(known, text):
                return known
        # ComfyUI runs in inference mode, whose tensors do not tell whether they have been changed.
        with torch.inference_mode(False):
            kept = text.clone()
        self._texts = [kept, *self._texts[: MOST_TEXTS - 1]]
        return kept
