"""Sampling settings that belong together, as the models' authors give them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ...distributed.job.sampling import SamplingSettings
from ...wan.model.variants import VARIANTS, Variant
from ..host.status import Status
from .widgets import INPUT_NAMES

CUSTOM = "custom"
BEGUN_WITH = "official T2V-A14B"
"""Whose settings, but the steps, the nodes that make videos begin with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Values of the inference node's widgets."""

    variant: str | None
    """Name of the one that it is for; None: any."""
    solver: str
    steps: int
    shift: float
    guidance_low: float
    guidance_high: float


# From the official configuration files and generate.py; Fun's from their makers' examples (VideoX-Fun, wan2.2_fun
# and wan2.1_fun, whose own shift is read by other samplers than the one they choose),
# Lightning from its own repository.
PRESETS: dict[str, Preset] = {
    "official T2V-A14B": Preset(
        variant="T2V", solver="unipc", steps=40, shift=12.0, guidance_low=3.0, guidance_high=4.0
    ),
    "official I2V-A14B": Preset(
        variant="I2V", solver="unipc", steps=40, shift=5.0, guidance_low=3.5, guidance_high=3.5
    ),
    "official TI2V-5B": Preset(
        variant="TI2V-5B", solver="unipc", steps=50, shift=5.0, guidance_low=5.0, guidance_high=5.0
    ),
    "official Wan2.1 I2V": Preset(
        variant="Wan2.1 I2V", solver="unipc", steps=40, shift=5.0, guidance_low=5.0, guidance_high=5.0
    ),
    "official Wan2.1 FLF2V": Preset(
        variant="FLF2V", solver="unipc", steps=50, shift=16.0, guidance_low=5.0, guidance_high=5.0
    ),
    "official Wan2.1 VACE": Preset(
        variant="VACE", solver="unipc", steps=50, shift=16.0, guidance_low=5.0, guidance_high=5.0
    ),
    "official Animate 14B": Preset(
        variant="Animate", solver="unipc", steps=20, shift=5.0, guidance_low=1.0, guidance_high=1.0
    ),
    "official Wan2.1 T2V": Preset(
        variant="T2V", solver="unipc", steps=50, shift=5.0, guidance_low=5.0, guidance_high=5.0
    ),
    "VACE-Fun A14B": Preset(variant="VACE", solver="euler", steps=50, shift=12.0, guidance_low=5.0, guidance_high=5.0),
    "Fun-Control A14B": Preset(
        variant="Fun-Control", solver="euler", steps=50, shift=5.0, guidance_low=6.0, guidance_high=6.0
    ),
    "Fun InP A14B": Preset(variant="I2V", solver="euler", steps=50, shift=5.0, guidance_low=6.0, guidance_high=6.0),
    "Fun-Camera A14B": Preset(
        variant="Fun-Camera", solver="euler", steps=50, shift=5.0, guidance_low=6.0, guidance_high=6.0
    ),
    "Fun-Control 5B": Preset(
        variant="Fun-Control 5B", solver="euler", steps=40, shift=5.0, guidance_low=6.0, guidance_high=6.0
    ),
    "Fun InP 5B": Preset(
        variant="Fun-InP 5B", solver="euler", steps=50, shift=5.0, guidance_low=6.0, guidance_high=6.0
    ),
    "Fun-Camera 5B": Preset(
        variant="Fun-Camera 5B", solver="euler", steps=50, shift=5.0, guidance_low=6.0, guidance_high=6.0
    ),
    "Wan2.1 Fun-Control": Preset(
        variant="Wan2.1 Fun-Control", solver="euler", steps=50, shift=5.0, guidance_low=6.0, guidance_high=6.0
    ),
    "Wan2.1 Fun-Control V1.1": Preset(
        variant="Wan2.1 Fun-Control V1.1", solver="euler", steps=50, shift=5.0, guidance_low=6.0, guidance_high=6.0
    ),
    "Wan2.1 Fun InP": Preset(
        variant="Wan2.1 I2V", solver="euler", steps=50, shift=5.0, guidance_low=6.0, guidance_high=6.0
    ),
    "Wan2.1 Fun-Camera V1.1": Preset(
        variant="Wan2.1 Fun-Camera", solver="euler", steps=50, shift=5.0, guidance_low=6.0, guidance_high=6.0
    ),
    "Lightning 4 steps": Preset(variant=None, solver="euler", steps=4, shift=5.0, guidance_low=1.0, guidance_high=1.0),
}


SET_BY_PRESETS = (
    *(INPUT_NAMES.get(field.name, field.name) for field in dataclasses.fields(Preset) if field.name != "variant"),
    "boundary",
)
"""Inputs of the nodes that make videos."""


def with_preset(sampling: SamplingSettings, name: str, variant: Variant, status: Status) -> SamplingSettings:
    """The settings with those of the preset `name`.

    Args:
        variant: of the model.
    """
    if name == CUSTOM:
        return sampling
    preset = PRESETS[name]
    values = {name: value for name, value in dataclasses.asdict(preset).items() if name != "variant"}
    tuned_for = variant if preset.variant is None else VARIANTS[preset.variant]
    if tuned_for.boundary is not None:
        values["boundary"] = tuned_for.boundary
    shown = (f"{INPUT_NAMES.get(key, key)} {_shown(value)}" for key, value in values.items())
    status.note(f"preset {name} set {', '.join(shown)}")
    if tuned_for != variant:
        status.warn(f"preset {name} is for {tuned_for.name} models; this one is {variant.name}")
    return dataclasses.replace(sampling, **values)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
