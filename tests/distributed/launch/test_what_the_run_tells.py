"""What only the run can know reaches its result: a prompt that was cut, a video of another size than asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from fresh_jobs import run_fresh
from jobs import run_tiny, tiny_job
from safetensors.torch import load_file, save_file
from wan_pack.distributed.job.job import FileIdentity, Job
from wan_pack.distributed.launch.result import Result, checked_result
from wan_pack.distributed.planning.preflight import check_job
from wan_pack.wan.vae.autoencoder import decode_frames, load_vae
from wan_pack.wan.vae.latents import normalise
from wan_pack.wan.video.frames_file import read_frames
from wan_pack.wan.video.video import probe


@pytest.fixture(scope="module")
def job(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Of two ranks, with a prompt that is too long and a VAE whose decoder makes four pixels for each."""
    plain = tiny_job(tiny_models, text="a red fox walks through deep snow " * 150, steps=2)
    state = load_file(plain.model.vae[0].path)
    for name in ("decoder.head.2.weight", "decoder.head.2.bias"):
        state[name] = state[name].repeat_interleave(4, 0)
    path = tmp_path_factory.mktemp("vae") / "Wan2.1_VAE_upscale2x.safetensors"
    save_file(state, path)
    return dataclasses.replace(plain, model=dataclasses.replace(plain.model, vae=(FileIdentity.of(path),)))


@pytest.mark.ranks
def test_the_result_says_what_was_cut_and_how_large_the_video_is(job: Job, tmp_path: Path):
    result = run_tiny(dataclasses.replace(job, frames=True), tmp_path)
    video = probe(result.folder.video(".mp4"))
    assert (video.width, video.height, video.frames) == (128, 96, 5)
    assert (result.info["video"]["width"], result.info["video"]["height"]) == (128, 96)
    (note,) = [line for line in result.info["warnings"] if line.startswith("prompt has ")]
    assert note.endswith(" tokens; it was cut to 512, which is what the model takes")
    assert int(note.split()[2]) > 512
    check_frames(job, result)
    check_spans(result)
    result.remove()
    assert not result.folder.path.exists()


def check_spans(result: Result) -> None:
    """Of what the start consisted of: each part once, in this order. One expert runs both steps."""
    names = [name for name, _, _ in result.info["spans"]]
    before = ["process", "import of torch", "device and kernels chosen", "ranks meet"]
    assert names == [*before, "model built", "weights read", "weights shared"]
    begun = [start for _, start, _ in result.info["spans"]]
    assert begun == sorted(begun) and all(seconds >= 0 for _, _, seconds in result.info["spans"])


def check_frames(job: Job, result: Result) -> None:
    """Of a video by two ranks: they are what one decoder makes of the latents, to what is promised."""
    images = read_frames(result.folder.frames, frames=5, width=128, height=96)
    vae = load_vae([job.model.vae[0].path])
    latents = normalise(load_file(result.folder.latents)["samples"], 16)
    decoded = torch.cat(list(decode_frames(vae, latents)), dim=1).permute(1, 2, 3, 0)
    assert (images - (decoded + 1) / 2).abs().max() < 1e-4
    assert images.std() > 0.01


@pytest.mark.ranks
def test_frames_are_kept_only_where_they_are_asked_for(tiny_models: Path, tmp_path: Path):
    """And the video has the format that it is asked for."""
    job = tiny_job(tiny_models)
    job = dataclasses.replace(job, sampling=dataclasses.replace(job.sampling, video_format="ffv1 mp4"))
    folder = run_fresh(job, tmp_path)
    assert not folder.frames.exists()
    assert [path.name for path in folder.path.glob("video*")] == ["video.mp4"]
    assert checked_result(folder, job)["video"]["format"] == "ffv1 mp4" and probe(folder.video(".mp4")).frames == 5
    folder.remove()


def test_the_preflight_says_that_the_vae_makes_twice_the_size(job: Job):
    notes: list[str] = []
    check_job(job, {}, notes.append)
    assert f"{job.model.vae[0].path} makes 2 x the size: the video is 128x96" in notes
