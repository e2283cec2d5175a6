"""Settings that a new graph begins with, or that were forgotten, and that do not suit the model: said, not changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...distributed.job.errors import listed
from ...distributed.job.job import ModelFiles
from ...distributed.job.sampling import SamplingSettings
from ...distributed.job.setting import default_of
from ...wan.model.variants import Variant
from ..models.loras import distilled, experts
from ..settings.presets import BEGUN_WITH, CUSTOM, PRESETS
from ..settings.widgets import INPUT_NAMES
from ..sockets.video_inputs import VideoInputs

TUNED = ("solver", "shift", "guidance_low", "guidance_high")
"""What each kind of model has its own values of, and a preset sets."""


def unsuited(asked: VideoInputs, model: ModelFiles, variant: Variant) -> Iterator[str]:
    """A warning for each."""
    if asked.preset == CUSTOM:
        if variant.name != PRESETS[BEGUN_WITH].variant and all(_as_begun_with(asked, name) for name in TUNED):
            inputs = listed(INPUT_NAMES.get(name, name) for name in TUNED)
            fitting = " or ".join(name for name, preset in PRESETS.items() if preset.variant == variant.name)
            yield f"{inputs} are as the node begins with, for {BEGUN_WITH}; for this model there is preset {fitting}"
    elif PRESETS[asked.preset].variant is None:
        names = [Path(expert.path).name for expert in experts(model) if not distilled(expert)]
        if names:
            yield (
                f"preset {asked.preset} is for models and LoRAs that are made for few steps; {listed(names)} "
                f"{'have' if len(names) > 1 else 'has'} no such name, and no such LoRA"
            )
    made = variant.latents.fps
    if not asked.followed and asked.decode_video and made != asked.sampling.fps and _as_begun_with(asked, "fps"):
        yield f"fps is {asked.sampling.fps:g}; videos of {variant.name} have {made:g}, so this one is slower"


def _as_begun_with(asked: VideoInputs, name: str) -> bool:
    value: object = getattr(asked.sampling, name)
    return value == default_of(SamplingSettings, name)
