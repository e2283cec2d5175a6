"""Sampling settings that belong together, as the models' authors give them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...wan.model.variants import VARIANTS, Variant
from ..host.status import Status

CUSTOM = "custom"


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


# From the official configuration files and generate.py; Lightning from its own repository.
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
    "Lightning 4 steps": Preset(variant=None, solver="euler", steps=4, shift=5.0, guidance_low=1.0, guidance_high=1.0),
}


def with_preset(settings: dict[str, Any], variant: Variant, status: Status) -> dict[str, Any]:
    """The node's settings with those of its preset, if it has one.

    Args:
        settings: the node's inputs by name.
        variant: of the model.
    """
    name = settings.get("preset", CUSTOM)
    if name == CUSTOM:
        return settings
    preset = PRESETS[name]
    values: dict[str, Any] = {
        "scheduler": preset.solver,
        "sample_steps": preset.steps,
        "shift": preset.shift,
        "guidance_low": preset.guidance_low,
        "guidance_high": preset.guidance_high,
    }
    tuned_for = variant if preset.variant is None else VARIANTS[preset.variant]
    if tuned_for.boundary is not None:
        values["boundary"] = tuned_for.boundary
    status.note(f"preset {name} set " + ", ".join(f"{key} {_shown(value)}" for key, value in values.items()))
    if tuned_for != variant:
        status.note(f"preset {name} is for {tuned_for.name} models; this one is {variant.name}")
    return {**settings, **values}


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
