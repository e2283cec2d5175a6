"""What is looked at of a job's result before it is believed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import stub_job
from safetensors.torch import save_file
from wan_pack.distributed.job.job import VERSION, Job, JobError
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.launch.result import checked_result

SHAPE = [1, 16, 2, 6, 8]


@pytest.fixture
def job() -> Job:
    return stub_job(gpu_count=1)


@pytest.fixture
def folder(job: Job, tmp_path: Path) -> Iterator[JobDir]:
    """Of a job that went well."""
    folder = JobDir.create(tmp_path)
    told(folder, job)
    save_file({"samples": torch.zeros(SHAPE)}, folder.latents)
    folder.video(".mp4").write_bytes(b"a video")
    folder.frames.write_bytes(b"frames")
    yield folder
    folder.remove()


def told(folder: JobDir, job: Job, **more: Any) -> None:
    folder.write_json(folder.result, {"id": job.id, "version": VERSION, "latents": {"shape": SHAPE}, **more})


def test_a_result_that_is_whole_is_taken(folder: JobDir, job: Job):
    assert checked_result(folder, job)["latents"] == {"shape": SHAPE}
    assert checked_result(folder, dataclasses.replace(job, frames=True))["id"] == job.id


@pytest.mark.parametrize("more", [{"id": "0f"}, {"id": None}, {"version": VERSION - 1}, {"version": None}])
def test_another_jobs_result_is_none(folder: JobDir, job: Job, more: dict[str, Any]):
    told(folder, job, **more)
    with pytest.raises(JobError, match=rf"result\.json is of job .*, not of '{job.id}'"):
        checked_result(folder, job)


@pytest.mark.parametrize(
    "tensors",
    [
        {"samples": torch.zeros(1, 16, 2, 6, 6)}, {"samples": torch.zeros(SHAPE, dtype=torch.float16)},
        {"latents": torch.zeros(SHAPE)},
    ],
)  # fmt: skip
def test_latents_are_those_that_are_promised(folder: JobDir, job: Job, tensors: dict[str, torch.Tensor]):
    save_file(tensors, folder.latents)
    with pytest.raises(JobError, match=r"latents\.safetensors is not what result\.json promises"):
        checked_result(folder, job)
    with pytest.raises(JobError, match="not what"):
        told(folder, job, latents={})
        checked_result(folder, job)


@pytest.mark.parametrize("how", ["empty", "missing"])
def test_a_video_and_frames_that_are_asked_for_are_there(folder: JobDir, job: Job, how: str):
    def spoil(path: Path) -> None:
        path.write_bytes(b"") if how == "empty" else path.unlink()

    spoil(folder.frames)
    checked_result(folder, job)
    with pytest.raises(JobError, match=r"frames\.int16 is missing or empty"):
        checked_result(folder, dataclasses.replace(job, frames=True))
    spoil(folder.video(".mp4"))
    with pytest.raises(JobError, match=r"video\.mp4 is missing or empty"):
        checked_result(folder, job)
    # Where only latents are made there is none.
    checked_result(folder, dataclasses.replace(job, decode=False))


def test_without_a_result_there_is_none(folder: JobDir, job: Job):
    folder.result.unlink()
    with pytest.raises(JobError, match=r"result\.json"):
        checked_result(folder, job)
