"""Presets of the inference node."""

from __future__ import annotations

from typing import Any

import pytest
from wan_pack.distributed.job.sampling import SamplingSettings
from wan_pack.nodes.host.status import Status
from wan_pack.nodes.settings.presets import CUSTOM, PRESETS, with_preset
from wan_pack.wan.model.variants import VARIANTS
from wan_pack.wan.sampling.schedule import SOLVERS

OWN = SamplingSettings(
    width=64, height=48, num_frames=5, solver="dpm++", steps=7, shift=2.0, guidance_low=9.0, guidance_high=9.0,
    boundary=0.5, seed=3,
)  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "name", "expected"),
    [
        ("official T2V-A14B", "T2V", ("unipc", 40, 12.0, 3.0, 4.0, 0.875)),
        ("official I2V-A14B", "I2V", ("unipc", 40, 5.0, 3.5, 3.5, 0.9)),
        ("official TI2V-5B", "TI2V-5B", ("unipc", 50, 5.0, 5.0, 5.0, 0.5)),
        ("official Wan2.1 I2V", "Wan2.1 I2V", ("unipc", 40, 5.0, 5.0, 5.0, 0.5)),
        ("official Wan2.1 FLF2V", "FLF2V", ("unipc", 50, 16.0, 5.0, 5.0, 0.5)),
        ("official Wan2.1 VACE", "VACE", ("unipc", 50, 16.0, 5.0, 5.0, 0.875)),
        ("official Animate 14B", "Animate", ("unipc", 20, 5.0, 1.0, 1.0, 0.5)),
        ("official Wan2.1 T2V", "T2V", ("unipc", 50, 5.0, 5.0, 5.0, 0.875)),
        ("VACE-Fun A14B", "VACE", ("euler", 50, 12.0, 5.0, 5.0, 0.875)),
        ("Fun-Control A14B", "Fun-Control", ("euler", 50, 5.0, 6.0, 6.0, 0.9)),
        ("Fun InP A14B", "I2V", ("euler", 50, 5.0, 6.0, 6.0, 0.9)),
        ("Fun-Camera A14B", "Fun-Camera", ("euler", 50, 5.0, 6.0, 6.0, 0.9)),
        ("Fun-Control 5B", "Fun-Control 5B", ("euler", 40, 5.0, 6.0, 6.0, 0.5)),
        ("Fun InP 5B", "Fun-InP 5B", ("euler", 50, 5.0, 6.0, 6.0, 0.5)),
        ("Fun-Camera 5B", "Fun-Camera 5B", ("euler", 50, 5.0, 6.0, 6.0, 0.5)),
        ("Wan2.1 Fun-Control", "Wan2.1 Fun-Control", ("euler", 50, 5.0, 6.0, 6.0, 0.5)),
        ("Wan2.1 Fun-Control V1.1", "Wan2.1 Fun-Control V1.1", ("euler", 50, 5.0, 6.0, 6.0, 0.5)),
        ("Wan2.1 Fun InP", "Wan2.1 I2V", ("euler", 50, 5.0, 6.0, 6.0, 0.5)),
        ("Wan2.1 Fun-Camera V1.1", "Wan2.1 Fun-Camera", ("euler", 50, 5.0, 6.0, 6.0, 0.5)),
        ("Lightning 4 steps", "T2V", ("euler", 4, 5.0, 1.0, 1.0, 0.875)),
        ("Lightning 4 steps", "I2V", ("euler", 4, 5.0, 1.0, 1.0, 0.9)),
        ("Lightning 4 steps", "TI2V-5B", ("euler", 4, 5.0, 1.0, 1.0, 0.5)),
    ],
)
def test_preset_sets_what_belongs_together(preset: str, name: str, expected: tuple[Any, ...]) -> None:
    status = Status()
    made = with_preset(OWN, preset, VARIANTS[name], status)
    names = ("solver", "steps", "shift", "guidance_low", "guidance_high", "boundary")
    assert tuple(getattr(made, name) for name in names) == expected
    assert made.seed == 3
    assert (len(status.notes), status.warnings) == (1, [])
    assert status.notes[0].startswith(f"preset {preset} set scheduler {expected[0]}, sample_steps {expected[1]},")
    assert ("boundary" in status.notes[0]) == (VARIANTS[name].boundary is not None)


def test_custom_changes_nothing() -> None:
    status = Status()
    assert with_preset(OWN, CUSTOM, VARIANTS["T2V"], status) == OWN
    assert status.notes == status.warnings == []


def test_preset_of_another_model_is_said() -> None:
    status = Status()
    made = with_preset(OWN, "official I2V-A14B", VARIANTS["T2V"], status)
    assert made.boundary == 0.9
    assert status.warnings[0] == "preset official I2V-A14B is for I2V models; this one is T2V"


def test_presets_name_solvers_that_exist() -> None:
    assert {preset.solver for preset in PRESETS.values()} <= set(SOLVERS)


def test_every_variant_has_a_preset() -> None:
    assert VARIANTS.keys() == {preset.variant for preset in PRESETS.values()} - {None}
