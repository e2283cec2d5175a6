"""What the evaluations of one sampling are conditioned on, on one rank: one brings it, and those behind it name it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...wan.model.config import WanConfig
from ...wan.sampling.told import KINDS, Kind, Size
from ...wan.transformer.conditions import Beside, made
from ...wan.transformer.context import Context
from ...wan.transformer.part import Part
from ..group.evaluation_request import Evaluation, SentKeys
from ..job.errors import JobError, listed
from ..job.evaluator import KEPT_ROW_BYTES, KEPT_VOLUME_BYTES
from ..parallel.sequence import SequenceShard
from ..planning.gpu_memory import GUIDED_PROMPTS

KEPT_TOLD_BYTES = 64 << 20
"""On the device, of what other evaluations than the last one are told: a plan counts that one's only."""


class KeptConditions:
    """Of one model.

    Args:
        keeps: what is derived of a text or a picture stays between evaluations.
    """

    def __init__(self, config: WanConfig, device: torch.device, *, keeps: bool) -> None:
        self._config, self._device, self._keeps = config, device, keeps
        self._stride = config.variant.latents.stride
        self._keys, self._volume_keys = SentKeys(KEPT_ROW_BYTES), SentKeys(KEPT_VOLUME_BYTES)
        self._whole: dict[str, Tensor] = {}
        """In the host's memory: rows, and what may go with latents of several sizes."""
        self._parts: dict[str, tuple[Size, Part]] = {}
        """The same: the size of the latents that it is of, and what the rank needs of it."""
        self._contexts: dict[str, Context] = {}
        """The one that was used last is last."""
        self._told: dict[tuple[str, Size], Part] = {}
        """On the device, by the size of the latents: what the last evaluation was told, and of what those before it
        were what is small, with what is derived of it. The one that was used last is last."""

    def check(self, evaluation: Evaluation) -> None:
        """Raises JobError if the model is given what it does not look at, or lacks what it does."""
        given = {told.kind for told in evaluation.told}
        for kind in KINDS.values():
            reads = kind.part in self._config.parts
            if kind.name in given and not reads:
                raise JobError(
                    f"the sampler gives a {kind.what}, and this model ({self._config.variant.name}) has no "
                    "place for one"
                )
            if reads and kind.needed and kind.name not in given:
                raise JobError(kind.needed)
        if evaluation.in_front and evaluation.by_frame:
            raise JobError("the sampler gives a frame in front and timesteps by frame; no model takes both")

    def take(self, evaluation: Evaluation, views: Sequence[memoryview], shard: SequenceShard) -> None:
        """Keeps what comes with an evaluation.

        Args:
            views: of what it sends, in order.
            shard: the rank's tokens.
        Raises:
            JobError: it is of another model.
        """
        kinds, latents = evaluation.kinds, evaluation.shape[2:]
        for sent, view in zip(evaluation.sent, views, strict=True):
            values = torch.frombuffer(view, dtype=getattr(torch, sent.dtype)).view(sent.shape)
            kind = kinds.get(sent.key)
            taken = self._config.text_dim if kind is None else kind.channels(self._config)
            given = sent.shape[-1] if kind is None or kind.size is None else sent.shape[0]
            if given != taken:
                what = "text" if kind is None else kind.what
                raise JobError(f"the {what} is of {given} channels; this model takes {taken}")
            # The memory is the other end's, and overwritten.
            if kind is None or kind.size is None or kind.of_several_sizes:
                self._whole[sent.key] = values.clone()
            else:
                self._check_size(kind, sent.shape, latents)
                part = made(kind.name, values, latents, self._stride).on_rank(shard.split, shard.length)
                self._parts[sent.key] = latents, part
        dropped = self._keys.use(evaluation.rows, evaluation.sent)
        dropped += self._volume_keys.use(evaluation.volumes, evaluation.sent)
        for key in dropped:
            self._whole.pop(key, None)
            self._parts.pop(key, None)
        # They hold on to memory of the host, too.
        self._told = {key: part for key, part in self._told.items() if key[0] not in dropped}
        there = self._whole.keys() | self._parts.keys()
        if missing := [key for key in (*evaluation.rows, *evaluation.volumes) if key not in there]:
            raise JobError(f"{missing[0]} is asked for, but was never sent")
        for key, kind in kinds.items():
            if key in self._whole:
                self._check_size(kind, tuple(self._whole[key].shape), latents)
            elif self._parts[key][0] != latents:
                raise JobError(
                    f"a {kind.what} is of [{listed(self._parts[key][0])}] frames, rows and columns; the latents are "
                    f"[{listed(latents)}]"
                )

    def texts(self, evaluation: Evaluation) -> list[Context]:
        """For each sample that of its text. What is derived of a text is kept for as many as a plan counts."""
        asked = {key: self._contexts.get(key) or self._context(key) for key in evaluation.texts}
        if self._keeps:
            last = {key: context for key, context in self._contexts.items() if key not in asked} | asked
            self._contexts = dict(list(last.items())[-GUIDED_PROMPTS:])
        return [asked[key] for key in evaluation.texts]

    def besides(self, evaluation: Evaluation, shard: SequenceShard) -> list[Beside]:
        """What each sample is told beside its text, of the rank's tokens. What is derived of it is kept while it is
        the same; while evaluations take turns, of what is small: a face is."""
        latents = evaluation.shape[2:]
        asked = {
            (key, latents): self._told.get((key, latents)) or self._part(key, kind, latents, shard)
            for key, kind in evaluation.kinds.items()
        }
        self._told = self._kept_beside(asked) | asked
        found: list[dict[str, Any]] = [{} for _ in evaluation.texts]
        for told in evaluation.told:
            for sample, keys, strengths in zip(found, told.keys, told.strengths, strict=True):
                parts = [self._told[key, latents] for key in keys]
                sample[told.kind] = parts[0]
                if KINDS[told.kind].most > 1:
                    sample[told.kind] = tuple(map(_of_strength, parts, strengths))
        return [Beside(**one) for one in found]

    def _kept_beside(self, asked: Collection[tuple[str, Size]]) -> dict[tuple[str, Size], Part]:
        """Of what the evaluations before were told, what was used last first, all that there is room for."""
        kept: list[tuple[tuple[str, Size], Part]] = []
        room = KEPT_TOLD_BYTES if self._keeps else 0
        for key, part in reversed(self._told.items()):
            if key not in asked and (size := part.device_bytes()) <= room:
                kept.append((key, part))
                room -= size
        return dict(reversed(kept))

    def _part(self, key: str, kind: Kind, latents: Size, shard: SequenceShard) -> Part:
        if key in self._parts:
            part = self._parts[key][1]
        else:
            part = made(kind.name, self._whole[key], latents, self._stride).on_rank(shard.split, shard.length)
        return part.on_device(self._device).for_expert(keep=self._keeps)

    def _context(self, key: str) -> Context:
        return Context(self._whole[key].to(self._device), keep=self._keeps)

    def _check_size(self, kind: Kind, shape: tuple[int, ...], latents: Size) -> None:
        if not kind.fits(shape, latents, self._stride):
            raise JobError(f"a {kind.what} has shape [{listed(shape)}]; the latents are [{listed(latents)}]")


def _of_strength(part: Any, strength: float) -> Any:
    """Of a kind of which there may be several."""
    return replace(part, strength=strength)
