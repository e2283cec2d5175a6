"""Sampling settings that belong together, as the models' authors give them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..host.status import Status

CUSTOM = "custom"
BOUNDARIES = {"t2v": 0.875, "i2v": 0.9}
"""Task of the model -> where the experts change; a model of one transformer has no such place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Values of the inference node's widgets."""

    task: str | None
    """Of the models that it is for; None: any."""
    solver: str
    steps: int
    shift: float
    guidance_low: float
    guidance_high: float


# From the official configuration files and generate.py; Lightning from its own repository.
PRESETS: dict[str, Preset] = {
    "official T2V-A14B": Preset(task="t2v", solver="unipc", steps=40, shift=12.0, guidance_low=3.0, guidance_high=4.0),
    "official I2V-A14B": Preset(task="i2v", solver="unipc", steps=40, shift=5.0, guidance_low=3.5, guidance_high=3.5),
    "official TI2V-5B": Preset(task="ti2v", solver="unipc", steps=50, shift=5.0, guidance_low=5.0, guidance_high=5.0),
    "Lightning 4 steps": Preset(task=None, solver="euler", steps=4, shift=5.0, guidance_low=1.0, guidance_high=1.0),
}


def with_preset(settings: dict[str, Any], task: str, status: Status) -> dict[str, Any]:
    """The node's settings with those of its preset, if it has one.

    Args:
        settings: the node's inputs by name.
        task: of the model: "t2v", "i2v" or "ti2v".
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
    boundary = BOUNDARIES.get(preset.task or task)
    if boundary is not None:
        values["boundary"] = boundary
    status.note(f"preset {name} set " + ", ".join(f"{key} {_shown(value)}" for key, value in values.items()))
    if preset.task not in (None, task):
        status.note(f"preset {name} is for {preset.task} models; this one is {task}")
    return {**settings, **values}


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
