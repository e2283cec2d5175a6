"""Settings that a new graph begins with and that do not suit its model are warned of; none is changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from node_inputs import asked_for, identity, model_files, use_model_folders
from wan_pack.distributed.job.job import LoraFile, ModelFiles
from wan_pack.distributed.job.sampling import SamplingSettings
from wan_pack.distributed.job.setting import default_of
from wan_pack.nodes.inference.unsuited import TUNED, unsuited
from wan_pack.nodes.settings.presets import BEGUN_WITH, PRESETS
from wan_pack.wan.model.variants import VARIANTS


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelFiles:
    use_model_folders(tmp_path, monkeypatch)
    return model_files(tmp_path)


def said(model: ModelFiles, variant: str, **inputs: Any) -> list[str]:
    return list(unsuited(asked_for(model=model, **inputs), model, VARIANTS[variant]))


def test_a_new_node_has_the_settings_of_a_preset() -> None:
    preset = PRESETS[BEGUN_WITH]
    assert all(getattr(preset, name) == default_of(SamplingSettings, name) for name in TUNED)
    assert default_of(SamplingSettings, "boundary") == VARIANTS["T2V"].boundary
    assert default_of(SamplingSettings, "fps") == VARIANTS["T2V"].latents.fps


@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_as_a_node_begins_with_are_for_one_model(model: ModelFiles, variant: str) -> None:
    fps = VARIANTS[variant].latents.fps
    if variant == "T2V":
        assert said(model, variant) == []
        return
    (line,) = said(model, variant, fps=fps)
    assert line.startswith(
        "scheduler, shift, guidance_low, guidance_high are as the node begins with, for official T2V-A14B; for "
    )
    fitting = [name for name, preset in PRESETS.items() if preset.variant == variant]
    assert fitting and line.endswith(f"there is preset {' or '.join(fitting)}")
    for name, value in {"scheduler": "euler", "shift": 8.0, "guidance_low": 1.0, "guidance_high": 3.5}.items():
        assert said(model, variant, fps=fps, **{name: value}) == [], "chosen by somebody"
    assert said(model, variant, fps=fps, preset=fitting[0]) == []


def test_frames_per_second_of_another_model(model: ModelFiles) -> None:
    preset = {"preset": "official TI2V-5B"}
    assert said(model, "TI2V-5B", **preset) == ["fps is 16; videos of TI2V-5B have 24, so this one is slower"]
    # What it follows says how many.
    control = {"preset": "Fun-Control 5B", "control_video": torch.zeros(5, 8, 8, 3)}
    assert said(model, "Fun-Control 5B", **control) == []
    assert said(model, "TI2V-5B", **preset, fps=20.0) == said(model, "TI2V-5B", **preset, decode_video=False) == []


def test_few_steps_of_a_model_that_is_made_for_many(model: ModelFiles, tmp_path: Path) -> None:
    preset = {"preset": "Lightning 4 steps"}
    lora = (LoraFile(file=identity(tmp_path / "loras" / "lightx2v_4steps.safetensors"), strength=1.0),)
    (line,) = said(model, "T2V", **preset)
    assert line == (
        "preset Lightning 4 steps is for models and LoRAs that are made for few steps; high.safetensors, "
        "low.safetensors have no such name, and no such LoRA"
    )
    (line,) = said(replace(model, high_noise_loras=lora), "T2V", **preset)
    assert "; low.safetensors has no such name" in line, "one of two is forgotten"
    both = replace(model, high_noise_loras=lora, low_noise_loras=lora)
    one = replace(model, high_noise=(identity(tmp_path / "ti2v_turbo_5B.safetensors"),), low_noise=())
    assert said(both, "T2V", **preset) == said(one, "TI2V-5B", **preset, fps=24.0) == []
