"""What a video is to start from or to follow, in every form and of every wrong shape: no job is made of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from node_inputs import asked_for, use_model_folders
from safetensors.torch import save_file
from torch import Tensor
from wan_pack.demo.tiny_expert import expert
from wan_pack.demo.tiny_vae import vae as tiny_vae
from wan_pack.distributed.job.job import FileIdentity, Job, ModelFiles
from wan_pack.nodes.host import host
from wan_pack.nodes.host.status import Status
from wan_pack.nodes.inference import inference as inference_module

NAN = float("nan")
KINDS = {
    "T2V": (16, ()), "I2V": (36, ()), "FLF2V": (36, ("img_emb", "emb_pos")), "VACE": (16, ("vace_blocks",)),
    "Fun-Control": (52, ("ref_conv",)), "Fun-Camera": (36, ("control_adapter",)),
}  # fmt: skip
"""Variant -> channels in and parts."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFiles]:
    folder = tmp_path_factory.mktemp("variants")
    save_file(tiny_vae(2), folder / "vae.safetensors")
    made = {}
    for kind, (channels, parts) in KINDS.items():
        save_file(expert(3, channels, parts=parts), folder / f"{kind}.safetensors")
        high_noise, vae = (FileIdentity.of(folder / f"{name}.safetensors") for name in (kind, "vae"))
        made[kind] = ModelFiles(high_noise=(high_noise,), low_noise=(), vae=(vae,))
    return made


@pytest.fixture
def no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_model_folders(tmp_path, monkeypatch)
    monkeypatch.setattr(host, "visible_gpus", lambda: "")
    monkeypatch.setattr(host, "free_memory", lambda: None)


def job_of(model: ModelFiles, given: dict[str, Any]) -> Job:
    """Of a video of 64x48 pixels and 5 frames."""
    size = {"width": 64, "height": 48, "num_frames": 5, "gpu_count": 1, "use_fsdp": False}
    return inference_module.build_job(asked_for(model=model, **{**size, "text_embeds": text(), **given}), Status())[0]


def text(dim: int = 64, value: float = 0.5, **extras: Any) -> list[Any]:
    """A CONDITIONING; also of the negative prompt."""
    return [[torch.full((1, 4, dim), value), extras]]


def both(**extras: Any) -> dict[str, Any]:
    return {"text_embeds": text(**extras), "negative_embeds": text(**extras)}


def seen(rows: int = 257, channels: int = 1280, value: float = 0.5) -> Any:
    return SimpleNamespace(penultimate_hidden_states=torch.full((1, rows, channels), value))


def full(*shape: int, value: float = 0.5) -> Tensor:
    return torch.full(shape, value)


def core_picture(channels: int = 16, frames: int = 2, rows: int = 6, batch: int = 1, value: float = 0.5) -> Any:
    latents = full(batch, channels, frames, rows, 8, value=value)
    return both(concat_latent_image=latents, concat_mask=full(1, 1, 2, 6, 8))


def core_vace(channels: int = 32, frames: int = 2, rows: int = 6, batch: int = 1, value: float = 0.5) -> Any:
    latents, mask = (full(batch, n, frames, rows, 8, value=value) for n in (channels, 64))
    return both(vace_frames=[latents], vace_mask=[mask], vace_strength=[1.0])


def embeds(channels: int = 20, frames: int = 2, rows: int = 6, value: float = 0.5) -> Any:
    latents = full(channels, frames, rows, 8, value=value)
    return {"image_embeds": {"image_embeds": latents[4:], "mask": latents[:4], "num_frames": 5}}


def rays(channels: int = 24, frames: int = 2, height: int = 48, batch: int = 1, value: float = 0.5) -> Any:
    return {"camera_conditions": full(batch, channels, frames, height, 64, value=value)}


def reference(channels: int = 16, rows: int = 6, value: float = 0.5) -> Any:
    return both(reference_latents=[full(1, channels, 1, rows, 8, value=value)])


def latent(channels: int = 16, frames: int = 2, rows: int = 6, batch: int = 1, value: float = 0.5) -> Any:
    return {"samples": {"samples": full(batch, channels, frames, rows, 8, value=value)}}


NEGATIVE = {"negative_embeds": text()}
IMAGE = full(1, 48, 64, 3)
PICTURE = {"start_image": IMAGE, **NEGATIVE}
FOLLOWED = {"control_video": full(5, 48, 64, 3), **NEGATIVE}
CLIP = {**PICTURE, "clip_vision_start_image": seen()}
BYTES = torch.full((1, 48, 64, 3), 255, dtype=torch.uint8)

NO_NUMBERS = "that are NaN or infinite; it must be numbers only"
WHOLE = r"holds whole numbers \(torch.uint8\); it must be an IMAGE .* in floating point"
THIS = "; this node makes 64x48, 5 frames. Set both to the same"
HIGH, LONG = f"is for 64x64, 5 frames{THIS}", f"is for 64x48, 9 frames{THIS}"
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("T2V", both(dim=768), r"text_embeds has shape \(4, 768\); it must be \[1 to 512, 64\]"),
    ("T2V", both(value=NAN), f"text_embeds holds 256 values of 256 {NO_NUMBERS}"),
    ("I2V", PICTURE | {"start_image": full(1, 48, 64, 1)}, r"start_image is \[1, 48, 64, 1\]; it must be an IMAGE"),
    ("I2V", PICTURE | {"start_image": full(1, 48, 64, 3, value=NAN)}, f"start_image .*{NO_NUMBERS}"),
    ("I2V", PICTURE | {"start_image": BYTES}, f"start_image {WHOLE}"),
    ("I2V", PICTURE | {"end_image": BYTES}, f"end_image {WHOLE}"),
    ("I2V", core_picture(channels=48), r"concat_latent_image .* \[1, 48, 2, 6, 8\]; Wan I2V takes \[1, 16, T, h, w\]"),
    ("I2V", core_picture(frames=3), f"concat_latent_image of text_embeds {LONG}"),
    ("I2V", core_picture(rows=8), f"concat_latent_image of text_embeds {HIGH}"),
    ("I2V", core_picture(batch=2), r"concat_latent_image .* \[2, 16, 2, 6, 8\]; Wan I2V takes \[1, 16, T, h, w\]"),
    ("I2V", core_picture(value=NAN), f"concat_latent_image .*{NO_NUMBERS}"),
    ("I2V", embeds(channels=52) | NEGATIVE, "image_embeds and their mask have 52 channels; they must have 20"),
    ("I2V", embeds(frames=3) | NEGATIVE, f"image_embeds {LONG}"),
    ("I2V", embeds(rows=8) | NEGATIVE, f"image_embeds {HIGH}"),
    ("I2V", embeds(value=NAN) | NEGATIVE, f"mask of image_embeds .*{NO_NUMBERS}"),
    ("FLF2V", CLIP | {"clip_vision_start_image": seen(577)}, r"\[577, 1280\]; .*\[257, 1280\] or \[514, 1280\]"),
    ("FLF2V", CLIP | {"clip_vision_start_image": seen(257, 1024)}, r"\[257, 1024\]; this model takes \[257, 1280\]"),
    ("FLF2V", CLIP | {"clip_vision_start_image": seen(value=NAN)}, f"clip_vision_start_image .*{NO_NUMBERS}"),
    ("VACE", core_vace(channels=96), r"vace_frames .* \[1, 96, 2, 6, 8\]; it must be \[1, 32, T, h, w\]"),
    ("VACE", core_vace(frames=1), f"the VACE control .* is for 64x48, 1 frames{THIS}"),
    ("VACE", core_vace(frames=3), "the VACE control .* is of 9 frames, and num_frames is 5; make them equal"),
    ("VACE", core_vace(rows=8), f"the VACE control .* {HIGH}"),
    ("VACE", core_vace(batch=2), r"vace_frames .* \[2, 32, 2, 6, 8\]; it must be \[1, 32, T, h, w\]"),
    ("VACE", core_vace(value=NAN), f"vace_frames .*{NO_NUMBERS}"),
    (
        "VACE",
        FOLLOWED | {"control_video": full(5, 48, 64, 1)},
        r"control_video is \[5, 48, 64, 1\]; it must be an IMAGE",
    ),
    ("VACE", FOLLOWED | {"control_video": full(5, 48, 64, 3, value=NAN)}, f"control_video .*{NO_NUMBERS}"),
    ("VACE", FOLLOWED | {"control_video": BYTES}, f"control_video {WHOLE}"),
    ("VACE", FOLLOWED | {"control_mask": full(5, 48, 64, value=NAN)}, f"control_mask .*{NO_NUMBERS}"),
    ("VACE", FOLLOWED | {"reference_images": full(1, 48, 64, 3, value=NAN)}, f"reference_images .*{NO_NUMBERS}"),
    ("VACE", FOLLOWED | {"reference_images": BYTES}, f"reference_images {WHOLE}"),
    (
        "Fun-Control",
        FOLLOWED | reference(channels=48),
        r"reference_latents .* \[1, 48, 1, 6, 8\]; .* \[1, 16, 1, h, w\]",
    ),
    ("Fun-Control", FOLLOWED | reference(rows=8), r"reference_latent has shape \[16, 8, 8\]; .* call for \[16, 6, 8\]"),
    ("Fun-Control", FOLLOWED | reference(value=NAN), f"reference_latents .*{NO_NUMBERS}"),
    ("Fun-Camera", PICTURE | rays(channels=6), r"camera_conditions has shape \[6, 2, .* call for \[24, 2, 48, 64\]"),
    ("Fun-Camera", PICTURE | rays(frames=3), f"camera_conditions {LONG}"),
    ("Fun-Camera", PICTURE | rays(height=64), f"camera_conditions {HIGH}"),
    (
        "Fun-Camera",
        PICTURE | rays(batch=2),
        r"camera_conditions has shape \[2, 24, .* a tensor \[1, 24, T, height, wid",
    ),
    ("Fun-Camera", PICTURE | rays(value=NAN), f"camera_conditions .*{NO_NUMBERS}"),
    ("T2V", NEGATIVE | latent(channels=48), f"samples is for 128x96, 5 frames{THIS}"),
    ("T2V", NEGATIVE | latent(frames=3), f"samples {LONG}"),
    ("T2V", NEGATIVE | latent(rows=8), f"samples {HIGH}"),
    ("T2V", NEGATIVE | latent(batch=2), "samples hold 2 videos; this node makes one"),
    ("T2V", NEGATIVE | latent(value=NAN), f"samples .*{NO_NUMBERS}"),
]
RIGHT: list[tuple[str, dict[str, Any]]] = [
    ("T2V", both()),
    ("T2V", NEGATIVE | latent()),
    ("I2V", PICTURE),
    ("I2V", core_picture()),
    ("I2V", embeds() | NEGATIVE),
    ("FLF2V", CLIP),
    ("VACE", core_vace()),
    ("VACE", FOLLOWED | {"control_mask": torch.ones(5, 48, 64, dtype=torch.bool)}),
    ("Fun-Control", FOLLOWED | reference()),
    ("Fun-Camera", PICTURE | rays()),
    ("Fun-Camera", PICTURE | {"camera_conditions": rays()["camera_conditions"].half()}),
]


@pytest.mark.parametrize(("kind", "given"), RIGHT)
@pytest.mark.usefixtures("no_gpu")
def test_what_is_right_is_taken(models: dict[str, ModelFiles], kind: str, given: dict[str, Any]) -> None:
    assert job_of(models[kind], given).model == models[kind]


@pytest.mark.parametrize(("kind", "given", "words"), WRONG)
@pytest.mark.usefixtures("no_gpu")
def test_what_is_wrong_is_refused(models: dict[str, ModelFiles], kind: str, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        job_of(models[kind], given)
