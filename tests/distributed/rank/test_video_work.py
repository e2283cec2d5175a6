"""The last steps of a video on one rank: what is decoded, and what the result says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import stub_job
from safetensors.torch import save_file
from torch import Tensor
from wan_pack.distributed.job.job import JobError, Parallel, Text
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.rank import video_work
from wan_pack.distributed.rank.video_work import VideoWork
from wan_pack.wan.model.variants import VARIANTS
from wan_pack.wan.vae.latents import denormalise
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
    work.session = SimpleNamespace(
        vae=lambda job: vae, memory=lambda: "", device=torch.device("cpu"), group=None, vae_ops="plain"
    )
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


class Steps:
    """What a rank tells at each step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, arrives: Any = lambda name, on_tensor: None) -> None:
        self.now, self.told, self.looks = 0.0, [], 0
        monkeypatch.setattr(video_work, "time", SimpleNamespace(perf_counter=lambda: self.now))
        work = object.__new__(VideoWork)
        work.device, work.job, work.folder = torch.device("cpu"), None, None  # type: ignore[assignment]
        work.steps, work.step_seconds, work._step_start = range(2, 6), [], 0.0
        self.entered: list[int] = []
        sparse = SimpleNamespace(enter=self.entered.append)
        experts = SimpleNamespace(check_pending=lambda: None, arrive=arrives)
        work.session = SimpleNamespace(sparse=sparse, experts=experts, check_stop=self.look)  # type: ignore[assignment]
        work.files = SimpleNamespace(progress=self.progress)  # type: ignore[assignment]
        self.work = work

    def look(self, folder: object, job: object) -> None:
        self.looks += 1

    def progress(self, phase: str, step: int, total: int, *, seconds_per_step: float | None, message: str) -> None:
        self.told.append((phase, step, total, seconds_per_step, message))


def test_steps_are_timed_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one, which warms up, says nothing of the others' pace."""
    steps = Steps(monkeypatch)
    steps.work.report_steps()
    for done, steps.now in ((1, 10.0), (2, 12.0), (3, 15.0)):
        steps.work.on_step(done)
    assert steps.work.step_seconds == [10.0, 2.0, 3.0]
    paces = [None, 10.0, 2.0, 2.5]
    assert steps.told == [("denoise", number, 4, pace, "") for number, pace in enumerate(paces)]
    # Attention is told of the step that comes, of the whole schedule.
    assert steps.entered == [3, 4, 5] and steps.looks == 3


def test_an_expert_that_is_waited_for_is_told_now_and_then_and_is_no_steps_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def arrive(name: str, on_tensor: Any) -> None:
        for number in range(1, 9):
            steps.now += video_work.MIN_INTERVAL * 0.55
            on_tensor(f"{name} expert", number, 8)

    steps = Steps(monkeypatch, arrives=arrive)
    steps.now = steps.work._step_start = 100.0
    steps.work.arrive("low_noise")
    parts = ["25%", "50%", "75%", "100%"]
    messages = [f"loading the low_noise expert {part}" for part in parts]
    assert [message for *_, message in steps.told] == [*messages, ""]
    steps.now += 3.0
    steps.work.on_step(1)
    assert steps.work.step_seconds == [pytest.approx(3.0)]


def test_an_expert_that_is_there_is_not_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    steps.work.arrive("high_noise")
    assert steps.told == []


def continued(folder: Path, samples: Tensor | None) -> Any:
    work = object.__new__(VideoWork)
    work.folder, work.device, work.noise = JobDir(folder), torch.device("cpu"), torch.zeros(16, 3, 2, 2)
    if samples is not None:
        save_file({"samples": samples}, work.folder.latents)
    return work


def test_what_was_denoised_before_is_taken_up(tmp_path: Path) -> None:
    assert continued(tmp_path, None).kept_latents() is None
    samples = torch.randn(1, 16, 3, 2, 2)
    kept = continued(tmp_path, samples).kept_latents()
    torch.testing.assert_close(denormalise(kept[None], 16), samples, rtol=1e-4, atol=1e-4)
    words = r"kept latents have shape \[1, 16, 2, 2, 2\]; the job makes \[16, 3, 2, 2\]"
    with pytest.raises(JobError, match=words):
        continued(tmp_path, samples[:, :, 1:].contiguous()).kept_latents()


@pytest.mark.parametrize("changed", ["job", "inputs", "noise", ""])
def test_ranks_with_other_inputs_or_noise_have_another_digest(tmp_path: Path, changed: str) -> None:
    seen: list[bytes] = []

    def digest(job: bytes, inputs: bytes, noise: Tensor) -> bytes:
        work = continued(tmp_path, None)
        work.noise = noise
        work.folder.job.write_bytes(job)
        work.folder.inputs.write_bytes(inputs)
        work.check_all_have = lambda digest, other: (seen.append(digest), other.index("noise"))
        work.check_ranks_agree()
        return seen[-1]

    plain: dict[str, Any] = {"job": b"a job", "inputs": b"inputs", "noise": torch.zeros(4)}
    other = {"job": b"a jab", "inputs": b"outputs", "noise": torch.tensor([0.0, 0.0, 0.0, 1e-7])}
    same = digest(**plain) == digest(**plain | {name: other[name] for name in other if name == changed})
    assert same is (not changed)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_encodes_the_prompts_and_has_notes_of_them(rank: int) -> None:
    asked: list[bool] = []
    work = object.__new__(VideoWork)
    job = stub_job(gpu_count=1, guidance_low=1.0, guidance_high=1.0)
    model = replace(job.model, text_encoder=job.model.vae)
    job = replace(job, model=model, text=Text(prompt="a cat"))
    work.job, work.rank, work.device, work.notes = job, rank, torch.device("cpu"), []
    work.config = SimpleNamespace(text_dim=4)  # type: ignore[assignment]
    rows = torch.arange(8.0).view(2, 4)

    def encode(job: Any, *, negative: bool, say: Any) -> list[Tensor]:
        asked.append(negative)
        return [rows, 2 * rows[:1]][: 1 + negative]

    prompts = SimpleNamespace(encode=encode, notes=["cut"])
    work.session = SimpleNamespace(prompts=prompts, mesh=None)  # type: ignore[assignment]
    work.files = SimpleNamespace(say=None)  # type: ignore[assignment]
    for guided in (False, True):
        sampling = replace(job.sampling, guidance_high=2.0 if guided else 1.0)
        work.job = replace(work.job, sampling=sampling)
        texts = work.texts()
        assert list(texts) == [True, False][: 1 + guided]
        assert all(text.shape == (512, 4) for text in texts.values())
        if rank == 0:
            assert torch.equal(texts[True][:2], rows) and not texts[True][2:].any()
            assert not guided or torch.equal(texts[False][:1], 2 * rows[:1])
    assert asked == ([False, True] if rank == 0 else [])
    assert work.notes == (["cut", "cut"] if rank == 0 else [])


def test_all_ranks_have_the_texts_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    work = object.__new__(VideoWork)
    job = stub_job(gpu_count=2)
    work.job = replace(job, model=replace(job.model, text_encoder=job.model.vae), text=Text(prompt="a cat"))
    work.rank, work.device, work.notes = 1, torch.device("cpu"), []
    work.config = SimpleNamespace(text_dim=4)  # type: ignore[assignment]
    work.session = SimpleNamespace(mesh=object())  # type: ignore[assignment]

    def broadcast(texts: Tensor, *, src: int) -> None:
        assert src == 0 and texts.shape == (2, 512, 4)
        texts[0], texts[1] = 1.0, 2.0

    monkeypatch.setattr(video_work.dist, "broadcast", broadcast)
    assert {one: text.unique().tolist() for one, text in work.texts().items()} == {True: [1.0], False: [2.0]}
    work.job = replace(job, text=None)
    work.inputs = {"context": torch.zeros(1), "context_null": torch.ones(1)}
    assert {one: text.item() for one, text in work.texts().items()} == {True: 0.0, False: 1.0}
