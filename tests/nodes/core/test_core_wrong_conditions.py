"""Conditioning that the model behind ComfyUI's MODEL socket does not take: refused before anything is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_sampling import Modules, PixelVae, empty_latents, text
from torch import Tensor
from wan_pack.distributed.job.job import FileIdentity
from wan_pack.nodes.core import prompt_entries
from wan_pack.nodes.core.group_model import GroupModel
from wan_pack.nodes.core.sampling_jobs import SamplingJobs
from wan_pack.nodes.host.core_model import CoreSampling, model_without_weights
from wan_pack.nodes.settings.spread import DistributedConfig
from wan_pack.wan.checkpoint.checkpoint import Checkpoint

NAN = float("nan")
SIZE = (3, 6, 8)
"""Latent frames, rows and columns of what is sampled; 48 x 64 pixels."""


class Asked(Exception):
    """The processes would have been started."""


class Door:
    """ComfyUI's MODEL of a variant, whose evaluators end the sampling."""

    def __init__(self, core: Modules, file: Path) -> None:
        checkpoint = Checkpoint([file])
        source = SimpleNamespace(open=self._open)
        jobs = SamplingJobs((FileIdentity.of(file),), (), DistributedConfig(), checkpoint.config, source)
        self._core, self.model = core, model_without_weights(checkpoint.shapes, GroupModel(jobs.prepare))

    def sample(self, told: dict[str, Any], rows: Tensor | None = None, **inputs: Any) -> None:
        prompt = text(1)[0][0] if rows is None else rows
        self._core["sampled"](self.model, positive=[[prompt, told]], negative=[[text(2)[0][0], told]], **inputs)

    def _open(self, job: Any) -> Any:
        raise Asked


@pytest.fixture
def door(
    core: Modules, expert_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Callable[[str], Door]:
    # What follows the checks.
    monkeypatch.setattr(SamplingJobs, "_job", lambda self, sampling: None)
    return lambda kind: Door(core, request.getfixturevalue("animate_file") if kind == "Animate" else expert_files[kind])


def seen(rows: int = 257, channels: int = 1280, value: float = 0.5) -> Any:
    return SimpleNamespace(penultimate_hidden_states=torch.full((1, rows, channels), value))


def volume(channels: int, *size: int, value: float = 0.5) -> Tensor:
    return torch.full((1, channels, *(size or SIZE)), value)


def picture(channels: int = 16, *size: int, value: float = 0.5) -> dict[str, Any]:
    return {"concat_latent_image": volume(channels, *size, value=value), "concat_mask": volume(1)}


def vace(**changed: Any) -> dict[str, Any]:
    return {"vace_frames": [volume(32)], "vace_mask": [volume(64)], "vace_strength": [1.0]} | changed


GOOD: dict[str, dict[str, Any]] = {
    "T2V": {},
    "I2V": picture(),
    "FLF2V": {**picture(), "clip_vision_output": seen(514)},
    "VACE": vace(),
    "Fun": {**picture(32), "reference_latents": [volume(16, 1, 6, 8)]},
    "Camera": {**picture(), "camera_conditions": volume(24, 3, 48, 64)},
    "InP 5B": picture(48),
}
"""Variant -> what ComfyUI's nodes add to a prompt."""
ONE_CONTROL = 96 * 3 * 6 * 8 * 4
"""Bytes."""
OTHER_VAE = "encode it with the Wan2.1 VAE"
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("I2V", picture(16, 2, 6, 8), r"concat_latent_image of the positive .* 2 latent frames, and what is sampled of 3"),
    (
        "I2V",
        picture(48),
        rf"concat_latent_image .* is \[1, 48, 3, 6, 8\]; .*I2V\) takes \[B, 16, T, h, w\]: {OTHER_VAE}",
    ),
    (
        "I2V",
        picture(32),
        r"is \[1, 32, .*I2V\) takes \[B, 16, T, h, w\]: it is of a node for another model, take the one for I2V",
    ),
    ("I2V", picture(value=NAN), r"concat_latent_image .* holds 2304 values of 2304 that are NaN or infinite"),
    ("I2V", {**picture(), "concat_mask": volume(1, 4, 6, 8)}, "concat_mask .* is of 4 latent frames, and .* of 3"),
    ("I2V", {**picture(), "concat_mask": volume(1, value=NAN)}, "concat_mask .* NaN or infinite"),
    ("I2V", {"concat_latent_image": "a picture"}, "concat_latent_image .* is str; it must be a tensor"),
    (
        "InP 5B",
        picture(16),
        r"is \[1, 16, 3, 6, 8\]; .*InP 5B\) takes \[B, 48, T, h, w\]: encode it with the Wan2.2 VAE",
    ),
    ("FLF2V", {"clip_vision_output": seen(514, 1024)}, r"is \[1, 514, 1024\]; .*B, n, 1280\]: load clip_vision_h"),
    ("FLF2V", {"clip_vision_output": seen(577)}, "has 577 rows; .*takes 257 or 514: load clip_vision_h"),
    ("FLF2V", {"clip_vision_output": seen(value=NAN)}, "clip_vision_output of the positive .* NaN or infinite"),
    ("FLF2V", {"clip_vision_output": "seen"}, "clip_vision_output .* is str; connect CLIP Vision Encode"),
    ("VACE", vace(vace_frames=[volume(96)]), rf"vace_frames .* is \[1, 96, .* takes \[B, 32, T, h, w\]: {OTHER_VAE}"),
    ("VACE", vace(vace_mask=[volume(64, 2, 6, 8)]), r"vace_frames .* of \[3, 6, 8\] .* and vace_mask of \[2, 6, 8\]"),
    ("VACE", vace(vace_frames=[volume(32), volume(32, 3, 8, 8)]), r"of \[3, 6, 8\], \[3, 8, 8\] .*all must be of one"),
    ("VACE", vace(vace_frames=[volume(32)] * 2), r"of \[3, 6, 8\], \[3, 6, 8\] .* and vace_mask of \[3, 6, 8\]"),
    ("VACE", vace(vace_frames=volume(32)), "vace_frames .* is Tensor of shape .*; it must be a list of latents"),
    ("VACE", vace(vace_frames=[volume(32, value=NAN)]), "vace_frames .* NaN or infinite"),
    ("VACE", vace(vace_mask=[volume(64, value=-NAN)]), "vace_mask .* NaN or infinite"),
    ("VACE", vace(vace_strength=[NAN]), "vace_strength of the positive conditioning is nan; it must be -1000"),
    (
        "VACE",
        vace(vace_frames=[volume(32, 3, 8, 8)], vace_mask=[volume(64, 3, 8, 8)]),
        r"the VACE control is of \[3, 8, 8\] .*and what is sampled of \[3, 6, 8\]",
    ),
    (
        "Fun",
        {"reference_latents": [volume(16, 1, 6, 8), volume(48, 1, 6, 8)]},
        r"reference_latents .* takes \[B, 16",
    ),
    ("Fun", {"reference_latents": [volume(48, 1, 6, 8)]}, rf"reference_latents .* \[B, 16, T, h, w\]: {OTHER_VAE}"),
    (
        "Fun",
        {"reference_latents": [volume(16, 1, 6, 8)[0]]},
        r"reference_latents .* is \[16, 1, 6, 8\]; .* takes \[B, 16",
    ),
    ("Fun", {"reference_latents": [volume(16, 1, 6, 8, value=NAN)]}, "reference_latents .* NaN or infinite"),
    (
        "Fun",
        {"reference_latents": [volume(16, 1, 8, 8)]},
        r"picture is of \[1, 8, 8\] .*and what is sampled of \[1, 6, 8\]",
    ),
    ("Fun", {**picture(16)}, r"concat_latent_image .* is \[1, 16, .* takes \[B, 32, "),
    (
        "Camera",
        {"camera_conditions": volume(6, 3, 48, 64)},
        r"is \[1, 6, 3, 48, 64\]; .* takes \[B, 24, T, height, width\]: .*WanCamera",
    ),
    ("Camera", {"camera_conditions": volume(24, 3, 48, 64, value=NAN)}, "camera_conditions .* NaN or infinite"),
    ("Camera", {"camera_conditions": volume(24, 2, 48, 64)}, r"is of \[2, 48, 64\] .*is sampled of \[3, 48, 64\]"),
    ("Camera", {"camera_conditions": volume(24, 3, 56, 64)}, r"is of \[3, 56, 64\] .*is sampled of \[3, 48, 64\]"),
]


@pytest.mark.parametrize("kind", GOOD)
def test_what_is_right_starts(door: Callable[[str], Door], kind: str) -> None:
    channels = 48 if kind == "InP 5B" else 16
    told = {**GOOD[kind], "pooled_output": None}
    with pytest.raises(Asked):
        door(kind).sample(told, latent_image=empty_latents(channels))
    # A batch of each, and half as wide.
    wide = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in told.items() if name in picture()}
    with pytest.raises(Asked):
        door(kind).sample({**told, **wide}, text(1)[0][0].half(), latent_image=empty_latents(channels, batch=2))


PIXELS = {"width": 64, "height": 48, "length": 9, "batch_size": 1}
VIDEO = torch.rand(9, 48, 64, 3, generator=torch.Generator().manual_seed(1))
NODES: list[tuple[str, str, dict[str, Any]]] = [
    ("I2V", "WanImageToVideo", {"start_image": VIDEO[:1]}),
    ("I2V", "WanFunInpaintToVideo", {"start_image": VIDEO[:1], "end_image": VIDEO[1:2]}),
    ("FLF2V", "WanFirstLastFrameToVideo", {"start_image": VIDEO[:1], "end_image": VIDEO[1:2]}),
    ("VACE", "WanVaceToVideo", {"control_video": VIDEO, "reference_image": VIDEO[:1], "strength": 1.0}),
    ("Fun", "Wan22FunControlToVideo", {"control_video": VIDEO, "ref_image": VIDEO[:1]}),
    ("Fun V1.1", "WanFunControlToVideo", {"control_video": VIDEO, "start_image": VIDEO[:1]}),
    ("Camera", "WanCameraImageToVideo", {"start_image": VIDEO[:1], "camera_conditions": volume(24, 3, 48, 64)}),
    ("Camera V1.1", "WanCameraImageToVideo", {"start_image": VIDEO[:1], "camera_conditions": volume(24, 3, 48, 64)}),
    (
        "Animate",
        "WanAnimateToVideo",
        {
            **{"reference_image": VIDEO[:1], "face_video": VIDEO, "pose_video": VIDEO, "background_video": VIDEO},
            **{"character_mask": VIDEO[..., 0], "continue_motion": VIDEO[:5]},
            **{"continue_motion_max_frames": 5, "video_frame_offset": 0},
        },
    ),
]
"""Variant, a node of ComfyUI's, and what it is given."""


@pytest.mark.parametrize(("kind", "name", "given"), NODES, ids=[f"{kind} {name}" for kind, name, _ in NODES])
def test_what_comfyuis_nodes_make_starts(
    core: Modules, door: Callable[[str], Door], kind: str, name: str, given: dict[str, Any]
) -> None:
    vae = PixelVae()
    node = getattr(core["comfy_extras.nodes_wan"], name)
    positive, negative, latent, *_ = node.execute(text(1), text(2), vae, **PIXELS, **given).result
    if kind in ("FLF2V", "Fun V1.1", "Camera V1.1", "Animate"):
        for entry in (*positive, *negative):
            entry[1]["clip_vision_output"] = seen()
    with pytest.raises(Asked):
        core["sampled"](door(kind).model, positive=positive, negative=negative, latent_image=latent)


@pytest.mark.parametrize(("kind", "changed", "words"), WRONG)
def test_what_is_wrong_starts_nothing(
    door: Callable[[str], Door], kind: str, changed: dict[str, Any], words: str
) -> None:
    channels = 48 if kind == "InP 5B" else 16
    with pytest.raises(ValueError, match=words):
        door(kind).sample({**GOOD[kind], **changed}, latent_image=empty_latents(channels))


def controls(count: int) -> dict[str, Any]:
    return vace(vace_frames=[volume(32)] * count, vace_mask=[volume(64)] * count, vace_strength=[1.0] * count)


@pytest.mark.parametrize(
    ("told", "most", "words"),
    [
        (
            controls(17),
            17 * ONE_CONTROL,
            r"has 17 VACE controls, 0.0 GiB; .* at most 16, .* Chain fewer WanVaceToVideo",
        ),
        (controls(16), 16 * ONE_CONTROL, ""),
        (
            controls(2),
            2 * ONE_CONTROL - 1,
            r"^the positive conditioning has 2 VACE controls, .* make the video smaller",
        ),
        ({"vace_mask": [volume(64)]}, ONE_CONTROL - 1, "has 1 VACE control, "),
        ({}, ONE_CONTROL - 1, "has 1 VACE control, "),
        ({}, ONE_CONTROL, ""),
        (
            vace(vace_strength=[1.0, 1.0]),
            ONE_CONTROL,
            r"is \[1.0, 1.0\]; it must be a list of 1 number, one for each VACE con",
        ),
    ],
)
def test_more_controls_than_are_taken_are_refused_before_anything_is_planned(
    door: Callable[[str], Door], monkeypatch: pytest.MonkeyPatch, told: dict[str, Any], most: int, words: str
) -> None:
    """A plan would count them, and say that they do not fit, or have ComfyUI let its models go."""
    monkeypatch.setattr(prompt_entries, "MAX_CONTROL_BYTES", most)
    if not words:
        with pytest.raises(Asked):
            door("VACE").sample(told)
        return
    monkeypatch.setattr(SamplingJobs, "_job", lambda self, sampling: pytest.fail("it was planned"))
    with pytest.raises(ValueError, match=words):
        door("VACE").sample(told)


def test_of_controls_a_context_window_has_its_part(
    door: Callable[[str], Door], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_entries, "MAX_CONTROL_BYTES", ONE_CONTROL * 2 // 3)
    with pytest.raises(ValueError, match="has 1 VACE control, "):
        door("VACE").sample(vace())
    monkeypatch.setattr(CoreSampling, "window", (1, 16, 2, 6, 8))
    with pytest.raises(Asked):
        door("VACE").sample(vace())


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            torch.zeros(1, 77, 768),
            r"cross_attn of the positive conditioning is \[1, 77, 768\]; .*B, n, 4096\]: load umt5",
        ),
        (torch.full((1, 9, 4096), NAN), "cross_attn of the positive conditioning holds 36864 values .* NaN"),
        (torch.zeros(9, 4096), r"cross_attn of the positive conditioning is \[9, 4096\]"),
    ],
)
def test_a_text_of_another_encoder(door: Callable[[str], Door], rows: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        door("T2V").sample({}, rows)


def test_latents_that_are_no_numbers(door: Callable[[str], Door]) -> None:
    latents = empty_latents()
    latents["samples"][0, 0, 0, 0, 0] = NAN
    with pytest.raises(
        ValueError, match=r"what the sampler starts from \(latents and pictures\) holds 2 values of 4608"
    ):
        door("T2V").sample({}, latent_image=latents)


def test_what_the_model_has_no_part_for_is_passed_over(door: Callable[[str], Door]) -> None:
    told = {key: value for good in GOOD.values() for key, value in good.items()}
    with pytest.raises(Asked):
        door("T2V").sample({**told, "clip_vision_output": seen(5)})
