"""One sampling of ComfyUI's, whose evaluations an `Evaluator` computes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...distributed.job.errors import listed
from ...distributed.job.evaluator import (
    KEPT_AT_LEAST,
    KEPT_ROW_BYTES,
    KEPT_VOLUME_BYTES,
    Evaluator,
    SampleConditioning,
    SampleTold,
)
from ...wan.model.latent_space import WAN21
from ...wan.sampling.told import KINDS, Kind
from ..host.exceptions import told_to_comfyui
from ..host.tensors import check_finite
from .unsupported import check_conds, check_options

if TYPE_CHECKING:
    from torch import Tensor


class Evaluation:
    """Translates ComfyUI's calls.

    Args:
        start: gives the evaluator; called for the first evaluation only, which a cache may make none.
    """

    def __init__(self, start: Callable[[], Evaluator]) -> None:
        self._start = start
        self._evaluator: Evaluator | None = None
        self._rows, self._volumes = _Known(KEPT_ROW_BYTES), _Known(KEPT_VOLUME_BYTES)

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
        # As ComfyUI's model takes one for all.
        timestep = timestep.expand(x.shape[0], *timestep.shape[1:])
        given = self._samples(context, conds, tuple(whole.shape), options)
        if self._evaluator is None:
            check_finite("what the sampler starts from (latents and pictures)", whole)
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
        self, context: Tensor, conds: Mapping[str, Any], shape: tuple[int, ...], options: Mapping[str, Any]
    ) -> list[SampleConditioning]:
        """What each sample of a batch is conditioned on: ComfyUI stacks prompts, each with all latents of its batch."""
        count = shape[0]
        prompts: Sequence[int] = options.get("cond_or_uncond") or [0]
        if count % len(prompts):
            # A node's wrapper around the model asks for a part of the batch, or for more.
            prompts = [0]
        each = count // len(prompts)
        told = [(kind, conds[kind.cond]) for kind in KINDS.values() if conds.get(kind.cond) is not None]
        return [
            SampleConditioning(
                text=self._rows.same(_of_sample(context, i)),
                told={kind.name: self._told(kind, _of_sample(one, i), conds, shape[2:]) for kind, one in told},
                conditional=prompts[i // each] == 0,
            )
            for i in range(count)
        ]

    def _told(
        self, kind: Kind, told: Tensor, conds: Mapping[str, Any], latents: tuple[int, ...]
    ) -> tuple[SampleTold, ...]:
        """Of one sample, of latents of this size: frames, rows and columns."""
        if kind.size is None:
            return (SampleTold(self._rows.same(told)),)
        if kind.most > 1:
            # Held against their number and their bytes in prompt_entries.py.
            parts, strengths = list(told), list(map(float, conds[kind.strengths]))
        else:
            # A picture comes without the axis of its one frame.
            parts, strengths = [told if told.dim() == 4 else told[:, None]], [1.0]
        for part in parts:
            if not kind.fits(tuple(part.shape), latents, WAN21.stride):
                expected = kind.size(latents, WAN21.stride)
                raise ValueError(
                    f"the {kind.what} is of [{listed(part.shape[1:])}] {kind.axes}, and what is sampled of "
                    f"{'at most ' * kind.fewer}[{listed(expected)}]: {kind.source}. It is not cut to areas or context "
                    "windows"
                )
        return tuple(
            SampleTold(self._volumes.same(part), strength) for part, strength in zip(parts, strengths, strict=True)
        )


class _Known:
    """The same object for the same values: ComfyUI copies them for each call.

    Args:
        most: bytes of what is remembered.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._tensors: list[Tensor] = []

    def same(self, given: Tensor) -> Tensor:
        """On the CPU, in float32."""
        import torch

        given = given.detach().to("cpu", torch.float32)
        for known in self._tensors:
            if known.shape == given.shape and torch.equal(known, given):
                return known
        # ComfyUI runs in inference mode, whose tensors do not tell whether they have been changed.
        with torch.inference_mode(False):
            kept = given.clone(memory_format=torch.contiguous_format)
        self._tensors.insert(0, kept)
        sizes = itertools.accumulate(max(tensor.nbytes, KEPT_AT_LEAST) for tensor in self._tensors)
        within = sum(size <= self._most for size in sizes)
        del self._tensors[max(within, 1) :]
        return kept


def _of_sample(stacked: Tensor, index: int) -> Tensor:
    return stacked[index % stacked.shape[0]]
