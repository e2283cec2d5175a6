"""ComfyUI's CLIP Vision Encode against ours, on one small model: the features, and what is made of a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from core_sampling import Modules
from safetensors.torch import load_file, save_file
from tiny_clip import as_open_clip, clip_weights, config
from wan_pack.wan.vision.clip_encoder import encode_pictures, load_clip
from wan_pack.wan.vision.clip_picture import fit_clip_picture

DIM = 64
CROPS = ["center", "none"]


@pytest.fixture
def theirs(core: Modules, tmp_path: Path) -> Any:
    """Its CLIP_VISION, which it makes of files of real sizes only."""
    (tmp_path / "config.json").write_text(json.dumps(config(DIM)))
    clip = core["comfy.clip_vision"].ClipVisionModel(str(tmp_path / "config.json"))
    missing, _ = clip.load_sd(clip_weights())
    assert not missing
    return clip


def picture(rows: int, columns: int) -> torch.Tensor:
    values = torch.rand(1, rows, columns, 3, generator=torch.Generator().manual_seed(3))
    return (values * 255).round() / 255


@pytest.mark.parametrize("crop", CROPS)
def test_same_features_of_what_it_makes_of_a_picture(core: Modules, theirs: Any, crop: str, tmp_path: Path) -> None:
    image = picture(150, 400)
    (seen,) = core["nodes"].CLIPVisionEncode().encode(theirs, image, crop)
    save_file(clip_weights(), tmp_path / "clip.safetensors")
    given = core["comfy.clip_vision"].clip_preprocess(image, crop=crop == "center")
    made = encode_pictures(load_clip([tmp_path / "clip.safetensors"]), given)
    torch.testing.assert_close(made, seen.penultimate_hidden_states[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("crop", CROPS)
def test_a_picture_of_clips_own_size_is_the_same_for_both(
    core: Modules, theirs: Any, crop: str, tmp_path: Path
) -> None:
    image = picture(224, 224)
    (seen,) = core["nodes"].CLIPVisionEncode().encode(theirs, image, crop)
    ours = fit_clip_picture(image[0])
    torch.testing.assert_close(ours, core["comfy.clip_vision"].clip_preprocess(image, crop=crop == "center")[0])
    save_file(clip_weights(), tmp_path / "clip.safetensors")
    made = encode_pictures(load_clip([tmp_path / "clip.safetensors"]), ours[None])
    torch.testing.assert_close(made, seen.penultimate_hidden_states[0], rtol=1e-4, atol=1e-5)


def test_of_another_size_ours_is_nearest_to_crop_none(core: Modules) -> None:
    """Smooth, as pictures are: what is left are its antialiasing and its 8 bits."""
    across = torch.linspace(0, 1, 800).expand(300, 800)
    down = torch.linspace(1, 0.2, 300)[:, None].expand(300, 800)
    image = torch.stack([across, down, (across * down).sqrt()], dim=-1)
    ours, preprocess = fit_clip_picture(image), core["comfy.clip_vision"].clip_preprocess
    whole, middle = ((ours - preprocess(image[None], crop=crop)[0]).abs().max() for crop in (False, True))
    assert whole < 0.03 < 0.5 < middle


def test_open_clips_names_are_read_as_comfyui_reads_them(core: Modules, tmp_path: Path) -> None:
    weights = as_open_clip(clip_weights())
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "clip.safetensors")
    read = core["comfy.clip_vision"].convert_to_transformers(load_file(tmp_path / "clip.safetensors"), "visual.")
    ours = load_clip([tmp_path / "clip.safetensors"]).state_dict()
    for name, tensor in ours.items():
        assert torch.equal(tensor, read[f"vision_model.{name.removeprefix('vision_model.')}"]), name
