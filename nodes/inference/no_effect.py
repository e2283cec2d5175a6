"""Inputs that are set and change nothing, with this model: said, not passed over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...distributed.job.job import ModelFiles, Sampling
from ...distributed.job.sampling import SamplingSettings
from ...distributed.job.setting import default_of
from ..settings.presets import CUSTOM
from ..sockets.video_inputs import VideoInputs

if TYPE_CHECKING:
    from ...wan.model.config import WanConfig


def without_effect(
    asked: VideoInputs, model: ModelFiles, config: WanConfig, sampling: Sampling, *, carried: bool, seen: bool,
    guided: bool,
) -> Iterator[str]:  # fmt: skip
    """A note for each.

    Args:
        carried: a VACE control comes with other nodes' embeds.
        seen: what CLIP sees comes with other nodes' outputs.
        guided: a step evaluates the negative prompt.
    """
    if asked.vace_strength != default_of(VideoInputs, "vace_strength"):
        strength = f"vace_strength is {asked.vace_strength:g}, which has no effect"
        if not config.variant.controlled:
            yield f"{strength}: this model ({config.variant.name}) follows no control"
        elif carried:
            yield f"{strength}: each control of text_embeds or image_embeds has its own"
    if model.clip_vision and not config.image_branch:
        yield f"clip_vision has no effect: this model ({config.variant.name}) has no image branch"
    elif model.clip_vision and seen:
        yield "clip_vision of Load Wan Video Model has no effect: what CLIP sees is given"
    if not guided:
        if asked.negative_embeds is not None:
            yield "negative_embeds has no effect: guidance is 1"
        elif asked.text_embeds is None and asked.negative_prompt.strip():
            yield "negative_prompt has no effect: guidance is 1"
    # A preset sets these for any model.
    if not (model.high_noise and model.low_noise) and asked.preset == CUSTOM:
        if sampling.boundary != default_of(SamplingSettings, "boundary"):
            yield f"boundary is {sampling.boundary:g}, which has no effect: the model is one transformer"
        used, unused = ("guidance_high", "guidance_low") if model.high_noise else ("guidance_low", "guidance_high")
        value = getattr(sampling, unused)
        if value not in (default_of(SamplingSettings, unused), getattr(sampling, used)):
            yield f"{unused} is {value:g}, which has no effect: {used} is that of the one transformer"
