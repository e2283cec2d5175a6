"""What is left of a job that failed behind its denoising is finished, not repeated."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fresh_jobs import run_fresh
from jobs import tiny_job
from safetensors.torch import save_file
from wan_pack.distributed.group import worker_group
from wan_pack.distributed.job.job import JobError
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.rank.video_work import VideoWork
from wan_pack.wan.video.video import probe


def distributed_run(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(worker_group.AGENT), "run", str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
    )


def test_kept_latents_are_decoded_without_denoising(tiny_models: Path, tmp_path: Path):
    """A job that made only latents, handed on as one that failed to decode them."""
    made = run_fresh(dataclasses.replace(tiny_job(tiny_models), decode=False), tmp_path)
    assert not made.video(".mp4").exists()
    kept = JobDir(tmp_path / "kept")
    shutil.copytree(made.path, kept.path)
    made.remove()
    kept.write_job(dataclasses.replace(kept.read_job(), decode=True))
    kept.result.unlink()
    done = distributed_run(kept.path)
    assert done.returncode == 0, done.stderr
    assert "continuing from the denoised latents" in done.stderr
    assert "denoise" not in done.stdout
    assert "decode" in done.stdout
    info = probe(kept.video(".mp4"))
    assert (info.width, info.height, info.frames) == (64, 48, 5)
    # Now it has a result, so that running it again repeats all of it.
    assert list(json.loads(kept.result.read_text())["phases"]) == ["start", "decode", "write"]


def test_latents_of_another_size_are_refused(tmp_path: Path):
    folder = JobDir(tmp_path)
    save_file({"samples": torch.zeros(1, 16, 2, 6, 8)}, folder.latents)
    worker = object.__new__(VideoWork)
    worker.folder, worker.device, worker.noise = folder, torch.device("cpu"), torch.zeros(16, 2, 6, 8)
    assert worker.kept_latents().shape == (16, 2, 6, 8)
    worker.noise = torch.zeros(16, 3, 6, 8)
    with pytest.raises(JobError, match=r"the kept latents have shape \[1, 16, 2, 6, 8\]"):
        worker.kept_latents()
