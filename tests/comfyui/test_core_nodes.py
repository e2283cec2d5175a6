"""ComfyUI's own nodes before and behind the inference node: conditioning with an image, latents in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from serving import HEIGHT, INFERENCE, WIDTH, Comfy, kept
from wan_pack.demo.client import Run
from wan_pack.demo.example import FUN_CAMERA, FUN_CONTROL, VACE, Prompt, example, node_id

pytestmark = pytest.mark.usefixtures("stay_warm")
FRAMES, STEPS = 9, 4
SIZE = {"width": WIDTH, "height": HEIGHT}


class Finished:
    """The one workflow that all tests here look at, after its run."""

    def __init__(self, comfy: Comfy, run: Run) -> None:
        assert run.ending[0] == "execution_success", run.ending
        self._output = comfy.server.base / "output"
        self._shown = comfy.outputs(run)

    def latents(self, name: str) -> torch.Tensor:
        """[C, T, h, w] as Save Latent wrote them."""
        (file,) = (self._output / "core").glob(f"{name}_*.latent")
        return load_file(file)["latent_tensor"][0]

    def video(self, node: str) -> torch.Tensor:
        """[n, H, W, 3] uint8 of the mp4."""
        (entry,) = self._shown[node]["video"]
        reader = imageio_ffmpeg.read_frames(str(self._output / entry["subfolder"] / entry["filename"]))
        next(reader)
        frames = [torch.frombuffer(bytearray(frame), dtype=torch.uint8).view(HEIGHT, WIDTH, 3) for frame in reader]
        return torch.stack(frames)

    def decoded(self) -> torch.Tensor:
        """[n, H, W, 3] uint8 of core VAE Decode, as Save Image wrote them."""
        return self.saved("core/frames")

    def saved(self, name: str) -> torch.Tensor:
        """[n, H, W, 3] uint8 of what Save Image wrote."""
        files = sorted(self._output.glob(f"{name}_*.png"))
        return torch.stack([torch.frombuffer(bytearray(read(file)), dtype=torch.uint8) for file in files]).view(
            -1, HEIGHT, WIDTH, 3
        )

    def status(self, name: str) -> str:
        return self._shown[f"status of {name}"]["text"][0]

    def shows(self, node: str) -> bool:
        return node in self._shown


def read(file: Path) -> bytes:
    with Image.open(file) as image:
        assert image.size == (WIDTH, HEIGHT)
        return image.convert("RGB").tobytes()


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def workflow(comfy: Comfy) -> Prompt:
    """An I2V video four ways: by core conditioning, by the picture itself, and by the first in two halves.

    The jobs share their processes, also with those of the next tests: keep_warm_seconds.
    """
    model = comfy.model

    def inference(**inputs: Any) -> dict[str, Any]:
        settings = {"num_frames": FRAMES, "sample_steps": STEPS, "seed": 5, "scheduler": "euler", "shift": 5.0}
        layout = {"gpu_count": 1, "use_ulysses": True, "use_fsdp": False, "offload_model": False, "prompt": ""}
        links = {"model": ["model", 0], "config": ["config", 0], "filename_prefix": "core/video"}
        return node(INFERENCE, **SIZE, **settings, **layout, **links, boundary=0.9, **inputs)

    conditioning = {"text_embeds": ["image to video", 0], "negative_embeds": ["image to video", 1]}
    config = {"master_port": 0, "memory_optimization": False, "torch_compile": False, "mixed_precision": "fp32"}
    layout = {"gpu_count": 1, "use_ulysses": True, "use_fsdp": False, "offload_model": False}
    prompt = {
        "picture": node("LoadImage", image=comfy.picture(WIDTH, HEIGHT)),
        "vae": node("VAELoader", vae_name=model.vae),
        "positive": node("TestCoreConditioning", seed=1, tokens=9, channels=64),
        "negative": node("TestCoreConditioning", seed=2, tokens=4, channels=64),
        "image to video": node(
            "WanImageToVideo",
            **SIZE,
            length=FRAMES,
            batch_size=1,
            positive=["positive", 0],
            negative=["negative", 0],
            vae=["vae", 0],
            start_image=["picture", 0],
        ),
        "model": node(
            "LoadWanVideoModel", high_noise=model.i2v_high_noise, low_noise=model.i2v_low_noise, vae=model.vae
        ),
        "config": node("WanVideoDistributedConfig", **layout, **config, keep_warm_seconds=300),
        "core": inference(**conditioning, samples=["image to video", 2]),
        "picture itself": inference(
            text_embeds=["positive", 0], negative_embeds=["negative", 0], start_image=["picture", 0]
        ),
        "first half": inference(**conditioning, end_step=STEPS // 2, decode_video=False),
        "second half": inference(**conditioning, samples=["first half", 4], start_step=STEPS // 2, add_noise=False),
        "decode": node("VAEDecode", samples=["core", 4], vae=["vae", 0]),
        "frames": node("SaveImage", images=["decode", 0], filename_prefix="core/frames"),
        "video of half": node(
            "SaveVideo", video=["first half", 3], filename_prefix="core/half", format="auto", codec="auto"
        ),
    }
    for name in ("core", "picture itself", "first half", "second half"):
        prompt[f"latents of {name}"] = node("SaveLatent", samples=[name, 4], filename_prefix=f"core/{name}")
        prompt[f"status of {name}"] = node("PreviewAny", source=[name, 2])
    return prompt


@pytest.fixture(scope="module")
def finished(comfy: Comfy) -> Finished:
    run = comfy.run(workflow(comfy))
    assert len(comfy.job_processes()) == 2, "the agent and the rank of all four"
    return Finished(comfy, run)


def test_samples_decoded_by_core_are_the_frames_of_our_video(comfy: Comfy, finished: Finished) -> None:
    from wan_pack.wan.vae.autoencoder import decode_frames, load_vae
    from wan_pack.wan.vae.latents import normalise

    decoded = finished.decoded()
    assert decoded.shape[0] == FRAMES
    vae = load_vae([comfy.server.base / "models" / "vae" / comfy.model.vae], dtype=torch.float32)
    latents = normalise(finished.latents("core"), 16)[None]
    frames = torch.cat([part.permute(1, 2, 3, 0) for part in decode_frames(vae, latents)])
    own = ((frames.clamp(-1, 1) + 1) * 127.5).round()
    # Save Image cuts the fraction off.
    assert (own - decoded.float()).abs().max() <= 1
    error = (finished.video("core").float() - decoded.float()).square().mean()
    psnr = 10 * torch.log10(255**2 / error)
    assert psnr > 30, f"{psnr:.1f} dB"


def test_picture_by_core_conditioning_is_the_picture_itself(finished: Finished) -> None:
    core, own = finished.latents("core"), finished.latents("picture itself")
    assert own.std() > 0.1
    difference = (core - own).abs().max() / own.abs().max()
    assert difference < 1e-3, difference


def test_two_halves_are_the_whole(finished: Finished) -> None:
    whole, half = finished.latents("core"), finished.latents("second half")
    assert (finished.latents("first half") - whole).abs().max() > 0.1
    assert (half - whole).abs().max() / whole.abs().max() < 1e-5
    assert "no video (decode_video is off)" in finished.status("first half")
    assert finished.shows("second half")
    assert not finished.shows("first half") and not finished.shows("video of half")


def test_images_arrive_when_they_are_linked_later(comfy: Comfy) -> None:
    """First nothing is linked to them, then Save Image is, with nothing else changed: the node runs again, and its
    frames are those of VAE Decode."""
    whole = workflow(comfy)
    names = ("picture", "vae", "positive", "negative", "image to video", "model", "config", "core", "decode")
    prompt = {name: whole[name] for name in names}
    prompt["core"]["inputs"]["filename_prefix"] = "linked/video"
    prompt["frames"] = node("SaveImage", images=["decode", 0], filename_prefix="linked/frames")
    first = Finished(comfy, comfy.run(prompt))
    prompt["images"] = node("SaveImage", images=["core", 5], filename_prefix="linked/images")
    second = Finished(comfy, comfy.run(prompt))
    assert torch.equal(first.video("core"), second.video("core"))
    images = second.saved("linked/images")
    decoded = second.saved("linked/frames")[-FRAMES:]
    assert images.shape == (FRAMES, HEIGHT, WIDTH, 3)
    # Both cut the fraction off.
    assert (images.int() - decoded.int()).abs().max() <= 1
    assert images.float().std() > 5
    # The node ran twice.
    assert len(list((comfy.server.base / "output" / "linked").glob("video_*.mp4"))) == 2


def test_the_vace_example_shows_its_video_without_the_reference(comfy: Comfy) -> None:
    """The reference picture is a latent frame in front of the samples; the video has as many frames as were asked."""
    prompt = kept(comfy.example(VACE, preset="custom", sample_steps=2, num_frames=FRAMES))
    video = node_id(prompt, INFERENCE)
    prompt["latents"] = node("SaveLatent", samples=[video, 4], filename_prefix="core/vace")
    run = comfy.run(prompt)
    finished = Finished(comfy, run)
    assert finished.latents("vace").shape[1] == 1 + (FRAMES - 1) // 4 + 1
    (entry,) = comfy.outputs(run)[video]["video"]
    path = comfy.server.base / "output" / entry["subfolder"] / entry["filename"]
    assert imageio_ffmpeg.count_frames_and_secs(str(path))[0] == FRAMES


def test_the_fun_control_example_follows_the_edges_of_its_picture(comfy: Comfy) -> None:
    """The reference picture is a frame for the model only."""
    prompt = kept(comfy.example(FUN_CONTROL, preset="custom", sample_steps=2, num_frames=FRAMES))
    video = node_id(prompt, INFERENCE)
    prompt["latents"] = node("SaveLatent", samples=[video, 4], filename_prefix="core/fun")
    run = comfy.run(prompt)
    assert Finished(comfy, run).latents("fun").shape[1] == (FRAMES - 1) // 4 + 1
    (status,) = comfy.outputs(run)[node_id(prompt, "PreviewAny")]["text"]
    assert f"control_video has 81 frames; the first {FRAMES} are used" in status


def test_the_fun_camera_example_has_its_size_and_length_from_the_camera(comfy: Comfy) -> None:
    prompt = kept(comfy.example(FUN_CAMERA, preset="custom", sample_steps=2))
    shipped, video = example(FUN_CAMERA), node_id(prompt, INFERENCE)
    prompt[video]["inputs"] |= {name: shipped[video]["inputs"][name] for name in ("width", "height", "num_frames")}
    prompt[node_id(prompt, "WanCameraEmbedding")]["inputs"] |= {**SIZE, "length": FRAMES}
    prompt["latents"] = node("SaveLatent", samples=[video, 4], filename_prefix="core/camera")
    run = comfy.run(prompt)
    assert Finished(comfy, run).latents("camera").shape[1:] == ((FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)
