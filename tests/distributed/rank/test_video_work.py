"""The last steps of a video on one rank: what is decoded, and what the result says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from wan_pack.distributed.job.job import JobError, Parallel
from wan_pack.distributed.rank import video_work
from wan_pack.distributed.rank.video_work import VideoWork
from wan_pack.wan.model.variants import VARIANTS
from wan_pack.wan.video.video_formats import FORMATS, H264


class Vae:
    """Remembers what it is given; four frames of each latent one but the first."""

    def __init__(self, frames: int) -> None:
        self.frames, self.latents, self.upscale = frames, torch.empty(0), 1

    def decode(self, latents: Tensor, *, clamp: bool, at_once: int) -> list[Tensor]:
        assert clamp and at_once == 6
        self.latents = latents
        return [torch.zeros(3, 1, 16, 16), torch.zeros(3, self.frames - 1, 16, 16)]


class Writer:
    """In the place of ffmpeg's."""

    def __init__(self, path: object, **settings: Any) -> None:
        self.settings, self.frames = settings, 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None: ...

    def write(self, part: Tensor) -> None:
        self.frames += part.shape[1]

    def finish(self) -> None: ...


def work_with(vae: Vae, rank: int = 0) -> Any:
    work = object.__new__(VideoWork)
    work.rank, work.device, work.phase_seconds = rank, torch.device("cpu"), {}
    sampling = SimpleNamespace(width=16, height=16, num_frames=9, fps=16.0, crf=18, file_format=FORMATS[H264])
    work.job = SimpleNamespace(sampling=sampling, frames=False, parallel=Parallel(gpu_count=1))
    work.folder = SimpleNamespace(video=lambda suffix: f"video{suffix}")
    work.config = SimpleNamespace(variant=VARIANTS["VACE"])
    work.session = SimpleNamespace(vae=lambda job: vae, memory=lambda: "", device=torch.device("cpu"), group=None)
    work.files = SimpleNamespace(progress=lambda *_, **__: None, end_process=None)
    return work


@pytest.fixture(autouse=True)
def _no_ffmpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan_pack.wan.video.video.VideoWriter", Writer)
    monkeypatch.setattr(video_work, "video_size", lambda job, session: {"width": 16, "height": 16})


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("references", [0, 2])
def test_reference_pictures_are_not_decoded(rank: int, references: int) -> None:
    """They are in front; to the VAE the first of them would be the video's first frame."""
    vae = Vae(frames=9)
    latents = torch.arange(references + 3.0).view(1, -1, 1, 1).expand(16, -1, 2, 2)
    assert work_with(vae, rank).decode(latents) == (9 if rank == 0 else 0)
    assert torch.equal(vae.latents, latents[None, :, references:])


def test_a_vae_that_makes_another_number_of_frames_is_an_error() -> None:
    with pytest.raises(JobError, match="the VAE made 5 frames; the job asks for 9"):
        work_with(Vae(frames=5)).decode(torch.zeros(16, 3, 2, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_latents_that_are_no_numbers_are_not_kept(bad: float) -> None:
    latents = torch.zeros(16, 3, 2, 2)
    latents[0, 0, 0, 0] = bad
    with pytest.raises(JobError, match="the denoised latents are not finite"):
        work_with(Vae(frames=9)).finish(latents)
