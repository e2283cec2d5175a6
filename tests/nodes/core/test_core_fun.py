"""Fun models behind ComfyUI's MODEL socket: control video, first frame, a reference picture in front, a camera."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from core_sampling import Modules, PixelVae, TwoModels, empty_latents, text
from wan_pack.wan.model.latent_space import WAN22

LIMIT = 1e-4
WIDTH, HEIGHT, FRAMES = 64, 48, 9


def controlled(core: Modules, kind: str, *, reference: bool) -> dict[str, Any]:
    """What ComfyUI's node gives KSampler."""
    nodes, vae = core["comfy_extras.nodes_wan"], PixelVae()
    video = torch.rand(FRAMES, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(1))
    given = {"start_image": video[:1].flip(1), "control_video": video}
    given |= {"ref_image": video[4:5].flip(2)} if reference else {}
    node = nodes.Wan22FunControlToVideo
    positive, negative, latent = node.execute(text(1), text(2), vae, WIDTH, HEIGHT, FRAMES, 1, **given).result
    if kind == "Fun V1.1":
        # That model has no mask among its channels, and looks at a picture through CLIP.
        seen = core["comfy.clip_vision"].Output()
        seen.penultimate_hidden_states = torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(2))
        for entry in (*positive, *negative):
            del entry[1]["concat_mask"], entry[1]["concat_mask_index"]
            entry[1]["clip_vision_output"] = seen
    return {"positive": positive, "negative": negative, "latent_image": latent}


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("kind", ["Fun", "Fun V1.1"])
def test_same_latents(core: Modules, expert_files: dict[str, Path], tmp_path: Path, kind: str, reference: bool) -> None:
    fun = TwoModels(core, expert_files[kind], tmp_path)
    given = controlled(core, kind, reference=reference)
    made = fun.same(lambda core, model: core["sampled"](model, **given), limit=LIMIT)
    without = controlled(core, kind, reference=False)
    changed = (made - core["sampled"](fun.ours, **without)).abs().max()
    assert bool(changed > 0.01) is reference, "the picture counts"


def test_a_picture_of_another_size_is_refused(core: Modules, expert_files: dict[str, Path], tmp_path: Path) -> None:
    fun = TwoModels(core, expert_files["Fun"], tmp_path)
    given = controlled(core, "Fun", reference=True) | {"latent_image": empty_latents(rows=8)}
    with pytest.raises(
        ValueError, match=r"the reference picture is of \[1, 6, 8\].*and what is sampled of \[1, 8, 8\]"
    ):
        core["sampled"](fun.ours, **given)


def test_a_model_without_a_place_for_it_passes_it_over_as_in_core(t2v: TwoModels) -> None:
    prompt = [[rows, {**rest, "reference_latents": [torch.ones(1, 16, 1, 6, 8)]}] for rows, rest in text(1)]
    t2v.same(lambda core, model: core["sampled"](model, positive=prompt), limit=LIMIT)


def filmed(core: Modules, kind: str, *, camera: bool = True, frames: int = FRAMES) -> dict[str, Any]:
    """What ComfyUI's nodes give KSampler."""
    wan, vae = core["comfy_extras.nodes_wan"], PixelVae()
    moves = core["comfy_extras.nodes_camera_trajectory"].WanCameraEmbedding.execute("Zoom In", WIDTH, HEIGHT, frames)
    given: dict[str, Any] = {"start_image": torch.rand(1, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(1))}
    given |= {"camera_conditions": moves.result[0]} if camera else {}
    if kind == "Camera V1.1":
        given["clip_vision_output"] = core["comfy.clip_vision"].Output()
        features = torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(2))
        given["clip_vision_output"].penultimate_hidden_states = features
    made = wan.WanCameraImageToVideo.execute(text(1), text(2), vae, WIDTH, HEIGHT, FRAMES, 1, **given).result
    return dict(zip(("positive", "negative", "latent_image"), made, strict=True))


@pytest.mark.parametrize("kind", ["Camera", "Camera V1.1"])
def test_a_camera_moves_as_in_core(core: Modules, expert_files: dict[str, Path], tmp_path: Path, kind: str) -> None:
    models = TwoModels(core, expert_files[kind], tmp_path)
    made = models.same(lambda core, model: core["sampled"](model, **filmed(core, kind)), limit=LIMIT)
    still = models.same(lambda core, model: core["sampled"](model, **filmed(core, kind, camera=False)), limit=LIMIT)
    assert (made - still).abs().max() > 0.01


def test_a_camera_of_another_video_is_refused(core: Modules, expert_files: dict[str, Path], tmp_path: Path) -> None:
    models = TwoModels(core, expert_files["Camera"], tmp_path)
    with pytest.raises(ValueError, match=r"the camera is of \[2, 48, 64\] .* and what is sampled of \[3, 48, 64\]"):
        core["sampled"](models.ours, **filmed(core, "Camera", frames=5))


def test_a_model_without_a_place_for_a_camera_passes_it_over_as_in_core(t2v: TwoModels) -> None:
    prompt = [[rows, {**rest, "camera_conditions": torch.ones(1, 24, 3, 48, 64)}] for rows, rest in text(1)]
    t2v.same(lambda core, model: core["sampled"](model, positive=prompt), limit=LIMIT)


@pytest.mark.parametrize("given", ["control", "reference", "first frame kept"])
def test_fun_control_5b(core: Modules, expert_files: dict[str, Path], tmp_path: Path, given: str) -> None:
    wan, vae = core["comfy_extras.nodes_wan"], PixelVae(WAN22)
    size = (64, 96, FRAMES)
    video = torch.rand(FRAMES, 96, 64, 3, generator=torch.Generator().manual_seed(1))
    told: dict[str, Any] = {"control_video": video, "start_image": video[:1].flip(1)}
    told |= {"ref_image": video[4:5].flip(2)} if given == "reference" else {}
    positive, negative, latent = wan.Wan22FunControlToVideo.execute(text(1), text(2), vae, *size, 1, **told).result
    if given == "first frame kept":
        latent = wan.Wan22ImageToVideoLatent.execute(vae, *size, 1, told["start_image"]).result[0]
    inputs = {"positive": positive, "negative": negative, "latent_image": latent}
    models = TwoModels(core, expert_files["Fun 5B"], tmp_path)
    models.same(lambda core, model: core["sampled"](model, **inputs), limit=LIMIT)


def test_fun_inp_5b(core: Modules, expert_files: dict[str, Path], tmp_path: Path) -> None:
    wan, vae = core["comfy_extras.nodes_wan"], PixelVae(WAN22)
    start, end = torch.rand(2, 1, 96, 64, 3, generator=torch.Generator().manual_seed(1))
    made = wan.WanFunInpaintToVideo.execute(text(1), text(2), vae, 64, 96, FRAMES, 1, start, end).result
    inputs = dict(zip(("positive", "negative", "latent_image"), made, strict=True))
    models = TwoModels(core, expert_files["InP 5B"], tmp_path)
    models.same(lambda core, model: core["sampled"](model, **inputs), limit=LIMIT)
