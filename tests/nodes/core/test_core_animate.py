"""Animate behind ComfyUI's MODEL socket: who it shows, a pose, a face, what is around."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_sampling import Modules, PixelVae, TwoModels, text
from tiny import TINY_ANIMATE
from wan_pack.nodes.core.prompt_entries import check_conditioning
from wan_pack.nodes.host.core_model import CoreSampling
from wan_pack.wan.transformer.motion_encoder import MotionEncoder

LIMIT = 1e-4
WIDTH, HEIGHT, FRAMES = 64, 48, 5
STEPS = 2


def pixels(seed: int, frames: int) -> torch.Tensor:
    return torch.rand(frames, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(seed))


def conditioned(core: Modules, **changes: Any) -> dict[str, Any]:
    """What ComfyUI's node gives KSampler."""
    vae, seen = PixelVae(), core["comfy.clip_vision"].Output()
    seen.penultimate_hidden_states = torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(FRAMES, HEIGHT, WIDTH)
    mask[:, 10:30, 16:40] = 1
    given = {
        "reference_image": pixels(3, 1), "clip_vision_output": seen, "pose_video": pixels(4, FRAMES),
        "face_video": pixels(5, 1), "background_video": pixels(6, FRAMES), "character_mask": mask,
    } | changes  # fmt: skip
    node = core["comfy_extras.nodes_wan"].WanAnimateToVideo
    size = {"width": WIDTH, "height": HEIGHT, "length": FRAMES, "batch_size": 1}
    settings = {"continue_motion_max_frames": 5, "video_frame_offset": 0}
    made = node.execute(text(1), text(2), vae, **size, **settings | given).result
    return dict(zip(("positive", "negative", "latent_image"), made, strict=False)) | {"steps": STEPS}


def encode_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Faces that come again, as they do at each step, are not computed again: the motion encoder has one size only."""
    encode, known = getattr(owner, name), []

    def remembered(*given: Any) -> torch.Tensor:
        *_, faces = given
        for before, motion in known:
            if torch.equal(before, faces):
                return motion
        known.append((faces.clone(), encode(*given)))
        return known[-1][1]

    monkeypatch.setattr(owner, name, remembered)


def test_same_latents(core: Modules, animate_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A face that is shorter than the video, and another one with the negative prompt."""
    animate = TwoModels(core, animate_file, tmp_path)
    encode_once(monkeypatch, MotionEncoder, "forward")
    encode_once(monkeypatch, animate.theirs.model.diffusion_model.motion_encoder, "get_motion")
    given = conditioned(core)
    faces = [given[name][0][1]["face_video_pixels"] for name in ("positive", "negative")]
    assert not torch.equal(*faces)
    made = animate.same(lambda core, model: core["sampled"](model, **given), limit=LIMIT)
    for name in ("face_video", "pose_video"):
        without = core["sampled"](animate.ours, **conditioned(core, **{name: None}))
        assert (made - without).abs().max() > 0.01, name


def test_a_video_goes_on_where_another_one_ended(core: Modules, animate_file: Path, tmp_path: Path) -> None:
    """From its last frame on, and from there in the other videos."""
    animate = TwoModels(core, animate_file, tmp_path)
    given = {"pose_video": pixels(4, 8), "background_video": pixels(6, 8), "face_video": None}
    begins = conditioned(core, **given)
    goes_on = conditioned(core, **given, continue_motion=pixels(7, 1), video_frame_offset=4)
    made, on = (
        animate.same(lambda core, model, told=told: core["sampled"](model, **told), limit=LIMIT)
        for told in (begins, goes_on)
    )
    assert (made - on).abs().max() > 0.01


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (
            {"pose_video_latent": torch.zeros(1, 16, 3, 6, 8)},
            r"the pose is of \[3, 6, 8\] .* sampled of at most \[2, 6, 8\]",
        ),
        ({"pose_video_latent": torch.zeros(1, 16, 2, 6, 4)}, r"the pose is of \[2, 6, 4\]"),
        (
            {"face_video_pixels": torch.zeros(1, 3, 9, 512, 512)},
            r"the face is of \[9, 512, 512\] frames, .* of at most \[5, 512, 512\]",
        ),
    ],
)
def test_what_is_of_another_video_is_refused(
    core: Modules, animate_file: Path, tmp_path: Path, told: dict[str, Any], words: str
) -> None:
    """As in a context window, to which ComfyUI does not cut it."""
    animate = TwoModels(core, animate_file, tmp_path)
    given = conditioned(core)
    for name in ("positive", "negative"):
        given[name] = [[rows, rest | told] for rows, rest in given[name]]
    with pytest.raises(ValueError, match=words):
        core["sampled"](animate.ours, **given)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (
            {"pose_video_latent": torch.zeros(1, 48, 2, 6, 8)},
            r"pose_video_latent of the positive conditioning is \[1, 48, .*takes \[B, 16, T, h, w\]: .*WanAnimateToV",
        ),
        ({"pose_video_latent": torch.full((1, 16, 2, 6, 8), float("nan"))}, "pose_video_latent .* NaN or infinite"),
        ({"face_video_pixels": torch.zeros(1, 3, 5, 256, 256)}, r"is \[1, 3, 5, 256, 256\].*\[B, 3, F, 512, 512\]"),
        ({"face_video_pixels": "a face"}, "face_video_pixels of the positive conditioning is str"),
    ],
)
def test_what_the_model_does_not_take_is_refused_before_anything_starts(told: dict[str, Any], words: str) -> None:
    seen = SimpleNamespace(penultimate_hidden_states=torch.zeros(1, 257, TINY_ANIMATE.clip_dim))
    entry = {"cross_attn": torch.zeros(1, 4, TINY_ANIMATE.text_dim), "clip_vision_output": seen}

    def check(**told: Any) -> None:
        conds = {"positive": [entry | told]}
        check_conditioning(CoreSampling(None, conds, {}, (1, 16, 3, 6, 8), torch.zeros(2)), TINY_ANIMATE)

    check(pose_video_latent=torch.zeros(1, 16, 2, 6, 8), face_video_pixels=torch.zeros(1, 3, 5, 512, 512))
    with pytest.raises(ValueError, match=words):
        check(**told)


def test_a_model_without_a_place_for_them_passes_them_over_as_in_core(t2v: TwoModels) -> None:
    told = {"pose_video_latent": torch.ones(1, 16, 2, 6, 8), "face_video_pixels": torch.ones(1, 3, 1, 512, 512)}
    prompt = [[rows, {**rest, **told}] for rows, rest in text(1)]
    t2v.same(lambda core, model: core["sampled"](model, positive=prompt), limit=LIMIT)
