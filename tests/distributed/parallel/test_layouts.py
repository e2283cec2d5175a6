"""Whole jobs: every layout makes the same video, and `run` repeats one without ComfyUI."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_jobs import run_fresh
from jobs import read_latents, tiny_job
from wan_pack.distributed.group import worker_group
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.wan.video.video import probe


@pytest.fixture(scope="module")
def plain(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobDir]:
    """A job of one rank without any option."""
    folder = run_fresh(tiny_job(tiny_models, gpu_count=1), tmp_path_factory.mktemp("plain"))
    yield folder
    folder.remove()


@pytest.mark.parametrize(
    "settings",
    [
        {"use_fsdp": True, "offload_model": True, "memory_optimization": True},
        {"use_ulysses": False, "use_fsdp": True, "gpu_count": 3},
    ],
    ids=str,
)
def test_every_layout_makes_the_same_latents(
    plain: JobDir, tiny_models: Path, tmp_path: Path, settings: dict[str, Any]
):
    folder = run_fresh(tiny_job(tiny_models, **settings), tmp_path)
    torch.testing.assert_close(read_latents(folder), read_latents(plain), rtol=1e-4, atol=1e-4)
    assert probe(folder.video(".mp4")).frames == 5
    if settings.get("offload_model"):
        assert "low_noise expert on the device" in folder.log(0).read_text()
    folder.remove()


def distributed_run(*arguments: Any, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(worker_group.AGENT), "run", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)


def test_run_repeats_a_job_without_comfyui(plain: JobDir, tmp_path: Path):
    """The same latents both times."""
    done = distributed_run(plain.path, "--output", tmp_path / "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"video: {tmp_path / 'out' / 'video.mp4'}" in done.stdout
    info = probe(tmp_path / "out" / "video.mp4")
    assert (info.width, info.height, info.frames) == (64, 48, 5)
    assert torch.equal(read_latents(JobDir(tmp_path / "out")), read_latents(plain))


@pytest.mark.processes
def test_run_names_a_folder_that_holds_no_job(tmp_path: Path):
    broken = distributed_run(tmp_path, folder=tmp_path)
    assert broken.returncode == 1
    assert "job.json cannot be read" in broken.stderr
