"""The same video on every number of ranks: whole jobs, through the launcher."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ...distributed.job.job import FileIdentity, Job, ModelFiles, Parallel, Sampling, Text
from ...distributed.launch.launcher import new_job_id, run_job
from ...distributed.machine.gpus import choose_gpus, list_gpus
from ..train.trained_files import NAMES, place
from ..train.world import FRAMES, HEIGHT, WIDTH
from .measure import psnr
from .pipeline import FPS, T2V, read_video

RANKS = (1, 2, 3, 4)


def same_on_ranks(models: Path, prompt: str, *, steps: int, ranks: Sequence[int] = RANKS) -> dict[int, float]:
    """Number of ranks -> decibels of its mp4 against the first number's, which is not among the keys.

    One process per GPU, as many as there are; without GPUs as many processes as asked for.
    """
    most = len(list_gpus()) or max(ranks)
    clips = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in ranks:
            if count <= most:
                clips[count] = _clip(_job(models, prompt, steps=steps, ranks=count), Path(folder))
    reference, *others = clips
    return {count: psnr(clips[count], clips[reference]) for count in others}


def _clip(job: Job, folder: Path) -> Tensor:
    result = run_job(job, lambda path: None, parent=folder / "jobs", failed=folder / "failed")
    try:
        return read_video(result.folder.video(".mp4"))
    finally:
        result.remove()


def _job(models: Path, prompt: str, *, steps: int, ranks: int) -> Job:
    """The job whose video `Pipeline.clip` computes in this process."""

    def files(name: str) -> tuple[FileIdentity, ...]:
        return (FileIdentity.of(place(models.resolve(), name)),)

    count, gpu_ids = choose_gpus(ranks)
    guidance = T2V.guidance
    return Job(
        id=new_job_id(),
        model=ModelFiles(
            high_noise=files(NAMES.high_noise), low_noise=files(NAMES.low_noise), vae=files(NAMES.vae),
            text_encoder=files(NAMES.text_encoder),
        ),
        parallel=Parallel(gpu_count=count, gpu_ids=gpu_ids, mixed_precision="fp32"),
        sampling=Sampling(
            width=WIDTH, height=HEIGHT, num_frames=FRAMES, steps=steps, seed=1,
            solver=T2V.solver, shift=T2V.shift, guidance_low=guidance.low, guidance_high=guidance.high,
            boundary=guidance.boundary, fps=FPS,
        ),
        text=Text(prompt=prompt),
    )  # fmt: skip
