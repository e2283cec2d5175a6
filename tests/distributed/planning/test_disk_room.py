"""What a job needs on disks, of what it is given, what it makes and where that is copied to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import tiny_job
from mount import GOLDEN
from safetensors.torch import load_file, save_file
from wan_pack.distributed.job.job import FileIdentity, Job
from wan_pack.distributed.planning.disk_room import room_of

PIXELS = 64 * 48 * 17


def job_with(tiny_models: Path, tmp_path: Path, *, scale: int, **changes: Any) -> Job:
    state = load_file(GOLDEN / "vae_wan21" / "vae" / "model.safetensors")
    for name in ("decoder.head.2.weight", "decoder.head.2.bias"):
        state[name] = state[name].repeat_interleave(scale**2, 0)
    save_file(state, tmp_path / "vae.safetensors")
    made = tiny_job(tiny_models, width=64, height=48, num_frames=17, gpu_count=1)
    model = dataclasses.replace(made.model, vae=(FileIdentity.of(tmp_path / "vae.safetensors"),))
    return dataclasses.replace(made, model=model, **changes)


@pytest.mark.parametrize("scale", [1, 2])
def test_room_for_what_the_vae_makes_and_for_its_copy(tiny_models: Path, tmp_path: Path, scale: int):
    """A VAE of twice the size makes four times the pixels; latents stay as they are."""
    jobs, output = tmp_path / "jobs", tmp_path / "output"
    given = {"control_video": torch.zeros(3, 17, 48, 64), "context": torch.zeros(7, 48, dtype=torch.bfloat16)}
    inputs = 3 * PIXELS * 4 + 7 * 48 * 2
    video = int(PIXELS * scale**2 * 0.9)
    job = job_with(tiny_models, tmp_path, scale=scale)
    assert room_of(job, given, jobs, output) == {jobs: inputs + PIXELS // 4 + video, output: video}
    assert room_of(job, {}, jobs, jobs) == {jobs: PIXELS // 4 + 2 * video}
    several = {jobs: 2 * (inputs + PIXELS // 4 + video), output: 5 * video}
    assert room_of(job, given, jobs, output, at_once=2, videos=5) == several
    assert room_of(job, {}, jobs, jobs, at_once=2, videos=5) == {jobs: 2 * (PIXELS // 4 + video) + 5 * video}
    kept = job_with(tiny_models, tmp_path, scale=scale, frames=True)
    assert room_of(kept, {}, jobs, output)[jobs] == int(PIXELS * (0.25 + 6 * scale**2)) + video
    latents = job_with(tiny_models, tmp_path, scale=scale, decode=False)
    assert room_of(latents, {}, jobs, output) == {jobs: PIXELS // 4, output: 0}
