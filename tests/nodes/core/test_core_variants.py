"""ComfyUI's own graph and our node on the same small models of Wan2.1 I2V, FLF2V and VACE: the same latents."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from core_sampling import CFG, SEED, TEXT_DIM, Modules, PixelVae
from fresh_jobs import run_fresh
from node_inputs import asked_for, use_model_folders
from safetensors.torch import load_file, save_file
from tiny_clip import config, write_clip
from torch import Tensor
from wan_pack.demo.tiny_expert import expert
from wan_pack.demo.tiny_vae import vae as tiny_vae
from wan_pack.distributed.job.job import FileIdentity, ModelFiles
from wan_pack.distributed.launch.result import checked_result
from wan_pack.nodes.host import host
from wan_pack.nodes.host.status import Status
from wan_pack.nodes.inference import inference as inference_module
from wan_pack.nodes.inference.outcome import inputs_writer
from wan_pack.wan.model.latent_space import WAN21, WAN22

pytestmark = [pytest.mark.processes, pytest.mark.ranks]

LIMIT = 1e-4
WIDTH, HEIGHT, FRAMES, SHIFT = 64, 48, 9, 8.0
"""SHIFT is ComfyUI's own for these models."""
SIZE = {"width": WIDTH, "height": HEIGHT, "length": FRAMES, "batch_size": 1}
PARTS = {
    "I2V": (36, ("img_emb",)), "FLF2V": (36, ("img_emb", "emb_pos")), "VACE": (16, ("vace_blocks",)),
    "InP": (36, ()), "Control": (52, ("ref_conv",)), "Control 2.1": (48, ("img_emb",)),
    "Control V1.1": (48, ("img_emb", "ref_conv")), "Camera": (36, ("control_adapter",)),
    "Camera V1.1": (32, ("img_emb", "control_adapter")), "Control 5B": (148, ("ref_conv",)),
    "Animate": (36, ("img_emb", "face_adapter")),
}  # fmt: skip
"""Model -> channels in and parts."""
OF_WAN22 = {"Control 5B"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each, and a VAE, as single files."""
    folder = tmp_path_factory.mktemp("variants")
    files = {name: folder / f"{name}.safetensors" for name in (*PARTS, "vae", "vae 5B")}
    for name, (channels, parts) in PARTS.items():
        space = WAN22 if name in OF_WAN22 else WAN21
        save_file(expert(3, channels, space.channels, text_dim=TEXT_DIM, parts=parts), files[name])
    save_file(tiny_vae(2), files["vae"])
    save_file(tiny_vae(2, WAN22), files["vae 5B"])
    return files


def text(seed: int) -> list[Any]:
    """A CONDITIONING as CLIP Text Encode makes it: ended with zeros."""
    rows = torch.zeros(1, 512, TEXT_DIM)
    rows[:, :9] = torch.randn(1, 9, TEXT_DIM, generator=torch.Generator().manual_seed(seed))
    return [[rows, {"pooled_output": None}]]


def pixels(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def clip_vision(core: Modules, seed: int) -> Any:
    output = core["comfy.clip_vision"].Output()
    output.penultimate_hidden_states = torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(seed))
    return output


class Run:
    """One model behind ComfyUI's KSampler, and as a job of our node."""

    def __init__(self, core: Modules, models: dict[str, Path], name: str, folder: Path) -> None:
        self.core, self.files, self.name, self.folder = core, models, name, folder
        self.vae = core["comfy.sd"].VAE(sd=load_file(models["vae"]), dtype=torch.float32)
        # ComfyUI's model of Animate encodes the faces anew at each.
        self.steps = 2 if name == "Animate" else 4

    def theirs(self, positive: Any, negative: Any, latent: Any) -> Tensor:
        """[C, T, h, w] of KSampler."""
        model = self.core["comfy.sd"].load_diffusion_model(str(self.files[self.name]))
        told = {"positive": positive, "negative": negative, "latent_image": latent}
        return self.core["sampled"](model, **told, steps=self.steps)[0]

    def ours(self, clip: Path | None = None, decode: bool = False, **inputs: Any) -> tuple[Tensor, int]:
        """[C, T, h, w] of our node, and the frames of its video if it makes one. clip: a vision model for the job."""
        vae = "vae 5B" if self.name in OF_WAN22 else "vae"
        files = {name: (FileIdentity.of(self.files[name]),) for name in (self.name, vae)}
        looks = () if clip is None else (FileIdentity.of(clip),)
        model = ModelFiles(high_noise=files[self.name], low_noise=(), vae=files[vae], clip_vision=looks)
        given = {
            "width": WIDTH, "height": HEIGHT, "num_frames": FRAMES, "sample_steps": self.steps, "seed": SEED,
            "shift": SHIFT, "scheduler": "euler", "guidance_low": CFG, "guidance_high": CFG, "gpu_count": 2,
            "use_fsdp": True, "config": None, "preview": False,
        }  # fmt: skip
        job, tensors = inference_module.build_job(asked_for(model=model, **{**given, **inputs}), Status())
        assert job.parallel.mixed_precision == "bf16"
        job = replace(job, parallel=replace(job.parallel, mixed_precision="fp32"), decode=decode)
        folder = run_fresh(job, self.folder / "jobs", inputs_writer(tensors))
        result, samples = checked_result(folder, job), load_file(folder.latents)["samples"][0]
        folder.remove()
        return samples, result["video"]["frames"] if decode else 0


@pytest.fixture
def run(
    core: Modules, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Run]:
    use_model_folders(tmp_path, monkeypatch)
    monkeypatch.setattr(host, "visible_gpus", lambda: "")
    monkeypatch.setattr(host, "free_memory", lambda: None)
    return lambda name: Run(core, models, name, tmp_path)


def same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape and theirs.std() > 0.1
    error = ((ours - theirs).norm() / theirs.norm()).item()
    assert error < LIMIT, error


def test_i2v(core: Modules, run: Callable[[str], Run]):
    made, picture, seen = run("I2V"), pixels(1, 1, HEIGHT, WIDTH, 3), clip_vision(core, 2)
    node = core["comfy_extras.nodes_wan"].WanImageToVideo
    positive, negative, latent = node.execute(
        text(1), text(2), made.vae, **SIZE, start_image=picture, clip_vision_output=seen
    ).result
    theirs = made.theirs(positive, negative, latent)
    ours, frames = made.ours(decode=True, text_embeds=positive, negative_embeds=negative, samples=latent)
    same(ours, theirs)
    assert frames == FRAMES
    ours, _ = made.ours(text_embeds=text(1), negative_embeds=text(2), start_image=picture, clip_vision_start_image=seen)
    same(ours, theirs)


def test_flf2v(core: Modules, run: Callable[[str], Run]):
    made, (start, end) = run("FLF2V"), pixels(1, 2, 1, HEIGHT, WIDTH, 3)
    seen = {"clip_vision_start_image": clip_vision(core, 2), "clip_vision_end_image": clip_vision(core, 3)}
    node = core["comfy_extras.nodes_wan"].WanFirstLastFrameToVideo
    positive, negative, latent = node.execute(
        text(1), text(2), made.vae, **SIZE, start_image=start, end_image=end, **seen
    ).result
    theirs = made.theirs(positive, negative, latent)
    same(made.ours(text_embeds=positive, negative_embeds=negative)[0], theirs)
    own = made.ours(text_embeds=text(1), negative_embeds=text(2), start_image=start, end_image=end, **seen)
    same(own[0], theirs)


def test_vace_with_control_video_mask_and_reference(core: Modules, run: Callable[[str], Run]):
    made, video, picture = run("VACE"), pixels(1, FRAMES, HEIGHT, WIDTH, 3), pixels(2, 1, HEIGHT, WIDTH, 3)
    mask = torch.zeros(FRAMES, HEIGHT, WIDTH)
    mask[3:, 10:, 20:50] = 1
    node = core["comfy_extras.nodes_wan"].WanVaceToVideo
    given = {"control_video": video, "control_masks": mask, "reference_image": picture, "strength": 0.8}
    positive, negative, latent, trim = node.execute(text(1), text(2), made.vae, **SIZE, **given).result
    theirs = made.theirs(positive, negative, latent)
    ours, frames = made.ours(decode=True, text_embeds=positive, negative_embeds=negative, samples=latent)
    same(ours, theirs)
    # The reference is in front of the latents, and not in the video.
    assert trim == 1 and ours.shape[1] == 4 and frames == FRAMES
    own = {"control_video": video, "control_mask": mask, "reference_images": picture, "vace_strength": 0.8}
    same(made.ours(text_embeds=text(1), negative_embeds=text(2), **own)[0], theirs)


def test_a_chain_of_vace_controls(core: Modules, run: Callable[[str], Run]):
    made, node = run("VACE"), core["comfy_extras.nodes_wan"].WanVaceToVideo
    positive, negative = text(1), text(2)
    for seed, strength in ((1, 1.0), (2, 0.4)):
        video = pixels(seed, FRAMES, HEIGHT, WIDTH, 3)
        positive, negative, latent, _ = node.execute(
            positive, negative, made.vae, **SIZE, strength=strength, control_video=video
        ).result
    theirs = made.theirs(positive, negative, latent)
    same(made.ours(text_embeds=positive, negative_embeds=negative)[0], theirs)


def test_fun_inp(core: Modules, run: Callable[[str], Run]):
    made, (start, end) = run("InP"), pixels(1, 2, 1, HEIGHT, WIDTH, 3)
    node = core["comfy_extras.nodes_wan"].WanFunInpaintToVideo
    positive, negative, latent = node.execute(
        text(1), text(2), made.vae, **SIZE, start_image=start, end_image=end
    ).result
    theirs = made.theirs(positive, negative, latent)
    same(made.ours(text_embeds=positive, negative_embeds=negative, samples=latent)[0], theirs)
    own = made.ours(text_embeds=text(1), negative_embeds=text(2), start_image=start, end_image=end)
    same(own[0], theirs)


@pytest.mark.parametrize("name", ["Control", "Control V1.1"])
def test_fun_control_with_a_reference_in_front(core: Modules, run: Callable[[str], Run], name: str):
    made, video, picture = run(name), pixels(1, FRAMES, HEIGHT, WIDTH, 3), pixels(2, 1, HEIGHT, WIDTH, 3)
    start = pixels(3, 1, HEIGHT, WIDTH, 3)
    node = core["comfy_extras.nodes_wan"].Wan22FunControlToVideo
    # What CLIP sees comes from another node: this one makes no conditioning for an image branch.
    seen = {"clip_vision_output": clip_vision(core, 2)} if "img_emb" in PARTS[name][1] else {}
    positive, negative = ([[rows, {**told, **seen}] for rows, told in text(seed)] for seed in (1, 2))
    positive, negative, latent = node.execute(
        positive, negative, made.vae, **SIZE, ref_image=picture, control_video=video, start_image=start
    ).result
    theirs = made.theirs(positive, negative, latent)
    ours, frames = made.ours(decode=True, text_embeds=positive, negative_embeds=negative, samples=latent)
    same(ours, theirs)
    # It is of no frame of the latents.
    assert ours.shape[1] == latent["samples"].shape[2] and frames == FRAMES
    own = {"control_video": video, "reference_images": picture, "start_image": start}
    own["clip_vision_start_image"] = seen.get("clip_vision_output")
    same(made.ours(text_embeds=text(1), negative_embeds=text(2), **own)[0], theirs)


def test_fun_control_of_wan21(core: Modules, run: Callable[[str], Run]):
    """A control video that is shorter than the video, and what CLIP sees in the first frame."""
    made, video, start = run("Control 2.1"), pixels(1, 5, HEIGHT, WIDTH, 3), pixels(3, 1, HEIGHT, WIDTH, 3)
    seen = clip_vision(core, 2)
    node = core["comfy_extras.nodes_wan"].WanFunControlToVideo
    positive, negative, latent = node.execute(
        text(1), text(2), made.vae, **SIZE, control_video=video, start_image=start, clip_vision_output=seen
    ).result
    theirs = made.theirs(positive, negative, latent)
    same(made.ours(text_embeds=positive, negative_embeds=negative, samples=latent)[0], theirs)
    own = {"control_video": video, "start_image": start, "clip_vision_start_image": seen}
    same(made.ours(text_embeds=text(1), negative_embeds=text(2), **own)[0], theirs)


def test_flf2v_whose_pictures_the_job_shows_to_clip(core: Modules, run: Callable[[str], Run], tmp_path: Path):
    """ComfyUI's CLIP Vision Encode on the same file; of such a size that nobody scales the pictures."""
    made, (start, end) = run("FLF2V"), (pixels(1, 2, 1, 224, 224, 3) * 255).round() / 255
    file, side = write_clip(tmp_path / "clip.safetensors", dim=1280), {"width": 224, "height": 224}
    (tmp_path / "clip.json").write_text(json.dumps(config(1280)))
    clip = core["comfy.clip_vision"].ClipVisionModel(str(tmp_path / "clip.json"))
    clip.load_sd(load_file(file))
    encode = core["nodes"].CLIPVisionEncode().encode
    seen = {
        f"clip_vision_{name}_image": encode(clip, one, "center")[0] for name, one in (("start", start), ("end", end))
    }
    node = core["comfy_extras.nodes_wan"].WanFirstLastFrameToVideo
    positive, negative, latent = node.execute(
        text(1), text(2), made.vae, **{**SIZE, **side}, start_image=start, end_image=end, **seen
    ).result
    theirs = made.theirs(positive, negative, latent)
    shown = {"text_embeds": text(1), "negative_embeds": text(2), "start_image": start, "end_image": end, **side}
    same(made.ours(clip=file, **shown)[0], theirs)
    # The pictures count, and their order.
    other = made.ours(clip=file, **{**shown, "start_image": end, "end_image": start})[0]
    assert (other - theirs).norm() / theirs.norm() > 10 * LIMIT


@pytest.mark.parametrize("name", ["Camera", "Camera V1.1"])
def test_fun_camera(core: Modules, run: Callable[[str], Run], name: str):
    made, start = run(name), pixels(3, 1, HEIGHT, WIDTH, 3)
    embedding = core["comfy_extras.nodes_camera_trajectory"].WanCameraEmbedding
    (moves, *_) = embedding.execute("Zoom In", WIDTH, HEIGHT, FRAMES).result
    seen = {"clip_vision_output": clip_vision(core, 2)} if "img_emb" in PARTS[name][1] else {}
    positive, negative, latent = (
        core["comfy_extras.nodes_wan"]
        .WanCameraImageToVideo.execute(
            text(1), text(2), made.vae, **SIZE, start_image=start, camera_conditions=moves, **seen
        )
        .result
    )
    theirs = made.theirs(positive, negative, latent)
    ours, frames = made.ours(decode=True, text_embeds=positive, negative_embeds=negative, samples=latent)
    same(ours, theirs)
    assert frames == FRAMES
    own = {"camera_conditions": moves, "start_image": start, "clip_vision_start_image": seen.get("clip_vision_output")}
    same(made.ours(text_embeds=text(1), negative_embeds=text(2), **own)[0], theirs)


@pytest.mark.parametrize("kept", [True, False])
def test_fun_control_5b(core: Modules, run: Callable[[str], Run], kept: bool):
    """What other nodes have encoded. kept: the first frame stays, as with TI2V-5B; else a picture is in front."""
    made, video, size = run("Control 5B"), pixels(1, FRAMES, 96, WIDTH, 3), (WIDTH, 96, FRAMES, 1)
    nodes, vae, given = core["comfy_extras.nodes_wan"], PixelVae(WAN22), {"control_video": video}
    given |= {"start_image": video[:1].flip(1)} | ({} if kept else {"ref_image": video[4:5].flip(2)})
    positive, negative, latent = nodes.Wan22FunControlToVideo.execute(text(1), text(2), vae, *size, **given).result
    if kept:
        latent = nodes.Wan22ImageToVideoLatent.execute(vae, *size, given["start_image"]).result[0]
    ours, frames = made.ours(decode=True, text_embeds=positive, negative_embeds=negative, samples=latent, height=96)
    same(ours, made.theirs(positive, negative, latent))
    assert frames == FRAMES


def test_animate(core: Modules, run: Callable[[str], Run]):
    """Who it shows is in front of the latents, and not in the video, which goes on from another one."""
    made, longer = run("Animate"), (FRAMES + 3, HEIGHT, WIDTH)
    given = {
        "reference_image": pixels(3, 1, HEIGHT, WIDTH, 3), "face_video": pixels(5, 4, 64, 64, 3),
        "pose_video": pixels(4, *longer, 3), "background_video": pixels(6, *longer, 3),
        "character_mask": (pixels(8, *longer) > 0.5).float(), "continue_motion": pixels(7, 9, HEIGHT, WIDTH, 3),
    }  # fmt: skip
    node = core["comfy_extras.nodes_wan"].WanAnimateToVideo
    settings = {"continue_motion_max_frames": 1, "video_frame_offset": 4, "clip_vision_output": clip_vision(core, 2)}
    positive, negative, latent, trim, *_ = node.execute(text(1), text(2), made.vae, **SIZE, **settings, **given).result
    ours, frames = made.ours(decode=True, text_embeds=positive, negative_embeds=negative, samples=latent)
    same(ours, made.theirs(positive, negative, latent))
    assert (trim, ours.shape[1], frames) == (1, 4, FRAMES)
