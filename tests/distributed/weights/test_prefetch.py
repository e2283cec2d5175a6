"""The second expert is read while the first one runs."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import read_latents, tiny_job, write_embeddings
from patience import until
from wan_pack.distributed.group.group_folder import GroupDir
from wan_pack.distributed.job.job import FileIdentity, Job, JobError
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.rank import experts
from wan_pack.distributed.rank.signs import RankFiles
from wan_pack.distributed.rank.video_work import VideoWork
from wan_pack.distributed.rank.worker import main as run_worker
from wan_pack.distributed.weights import prefetch, streaming
from wan_pack.distributed.weights.prefetch import Prefetch, read_ahead
from wan_pack.wan.checkpoint.checkpoint import Checkpoint

LOADING = "denoise 3/4 loading the low_noise expert"
SECONDS = 20.0
"""More than anything here takes: what never comes fails, and does not hang."""


def test_an_error_is_raised_as_soon_as_somebody_looks() -> None:
    def read(on_read: Callable[[int, int], None]) -> None:
        raise OSError("x.safetensors ended at byte 7")

    reading = Prefetch(read)
    reading.stop()
    with pytest.raises(OSError, match="ended at byte 7"):
        reading.check()


def test_reading_that_nobody_needs_any_more_ends() -> None:
    begun, calls = threading.Event(), []

    def read(on_read: Callable[[int, int], None]) -> None:
        while True:
            calls.append(begun.set())
            on_read(1, 2)

    reading = Prefetch(read)
    assert begun.wait(SECONDS)
    reading.stop()
    count = len(calls)
    reading.check()
    assert len(calls) == count


def test_processes_of_a_machine_read_every_byte_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "PIECE_BYTES", 8)
    monkeypatch.setattr(prefetch, "BUFFER_BYTES", 4)
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, size in zip(paths, (50, 8), strict=True):
        path.write_bytes(bytes(size))
    names = {path.stat().st_ino: path.name for path in paths}
    seen: list[tuple[str, int]] = []
    preadv = os.preadv

    def watch(fd: int, buffers: list[Any], offset: int) -> int:
        count = preadv(fd, buffers, offset)
        seen.extend((names[os.fstat(fd).st_ino], offset + i) for i in range(count))
        return count

    monkeypatch.setattr(os, "preadv", watch)
    told: list[tuple[int, int]] = []
    for part in range(3):
        read_ahead([str(path) for path in paths], lambda done, total: told.append((done, total)), part=part, parts=3)
    assert sorted(seen) == [("a", i) for i in range(50)] + [("b", i) for i in range(8)]
    assert all(0 < done <= total == 58 for done, total in told)
    # Behind the first file's 50 the second's 8 are the last.
    assert sorted(done for done, _ in told) == [8, 16, 24, 32, 40, 48, 50, 58]
    with pytest.raises(FileNotFoundError, match="none"):
        read_ahead([str(tmp_path / "none")], lambda done, total: None)


def test_who_waits_is_told_now_and_then_how_far_it_is() -> None:
    go, told, waits = threading.Event(), list[tuple[int, int]](), list[float]()

    def read(on_read: Callable[[int, int], None]) -> None:
        go.wait(SECONDS)
        on_read(3, 4)

    reading = Prefetch(read)
    join = reading._thread.join
    reading._thread.join = lambda seconds: (waits.append(seconds), join(seconds))[1]  # type: ignore[method-assign]

    def on_read(done: int, total: int) -> None:
        told.append((done, total))
        go.set()

    reading.wait(on_read)
    assert told[0] == (0, 1) and told[-1] == (3, 4) and set(waits) == {0.1} and reading._thread.daemon


@pytest.mark.parametrize(("available", "paths"), [(None, 2), (30, 2), (29, 0)])
def test_files_are_read_ahead_where_the_hosts_memory_holds_all_of_them(
    available: int | None, paths: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    monkeypatch.setattr(prefetch, "read_ahead", lambda paths, on_read, **share: read.append((paths, share)))
    monkeypatch.setattr(prefetch, "available_bytes", lambda: available)
    files = [FileIdentity(path=f"/{name}", size=size, mtime_ns=1) for name, size in (("a", 10), ("b", 20))]
    prefetch.prefetch_files(files, part=1, parts=3).wait(lambda done, total: None)
    assert read == [(["/a", "/b"][:paths], {"part": 1, "parts": 3})]


class Rank:
    """The only rank of its jobs, in this process: latents, no video."""

    def __init__(self, models: Path, folder: Path) -> None:
        self.models, self.folder = models, folder
        self.session: Any = None
        self.messages: list[str] = []

    def job(self, **settings: Any) -> Job:
        # The second expert has the last of the four steps.
        settings = {"gpu_count": 1, "boundary": 0.9, "guidance_low": 1.0, "guidance_high": 1.0, **settings}
        return dataclasses.replace(tiny_job(self.models, **settings), decode=False)

    def run(self, job: Job) -> torch.Tensor:
        folder = JobDir.create(self.folder)
        folder.write_job(job)
        write_embeddings(folder.inputs)
        files, progress = RankFiles(folder, 0), RankFiles.progress

        def watch(phase: str, step: int, total: int, **more: Any) -> None:
            self.messages.append(f"{phase} {step}/{total} {more.get('message', '')}".rstrip())
            progress(files, phase, step, total, **more)

        files.progress = watch  # type: ignore[method-assign]
        try:
            self.session = run_worker(GroupDir(folder.path), folder, files, self.session)
            return read_latents(folder)
        finally:
            folder.remove()


@pytest.fixture
def rank(tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rank:
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    return Rank(tiny_models, tmp_path)


@pytest.fixture
def read_late(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Has something done before each tensor of the low-noise expert is read."""

    def put(before: Callable[[], None]) -> None:
        read_into = Checkpoint.read_into

        def late(checkpoint: Checkpoint, name: str, *rest: Any, **more: Any) -> None:
            if "low" in checkpoint.label:
                before()
            read_into(checkpoint, name, *rest, **more)

        monkeypatch.setattr(Checkpoint, "read_into", late)

    return put


def test_steps_begin_before_the_other_expert_is_read(
    rank: Rank, read_late: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And end in the latents of a job whose experts were both there."""
    stepped, on_step = threading.Event(), VideoWork.on_step

    def watch(worker: VideoWork, done: int) -> None:
        on_step(worker, done)
        if done == 3:
            stepped.set()

    def wait() -> None:
        assert stepped.wait(SECONDS), "the steps wait for the second expert"
        # Whose reading lasts until it is said.
        assert until(lambda: any(message.startswith(LOADING) for message in rank.messages))

    monkeypatch.setattr(VideoWork, "on_step", watch)
    monkeypatch.setattr("wan_pack.distributed.rank.video_work.MIN_INTERVAL", 0.0)
    read_late(wait)
    cold = rank.run(rank.job(keep_warm_seconds=300.0))
    loading = [message.startswith(LOADING) for message in rank.messages]
    assert any(loading)
    assert rank.messages[len(loading) - loading[::-1].index(True)] == "denoise 3/4", "it no longer loads"
    warm = rank.run(rank.job(keep_warm_seconds=300.0))
    assert torch.equal(cold, warm)


@pytest.mark.parametrize("stays", [{}, {"keep_warm_seconds": 300.0}, {"more_follow": True}], ids=str)
def test_experts_are_kept_by_processes_that_stay(rank: Rank, stays: dict[str, Any]) -> None:
    rank.run(rank.job(**stays))
    assert bool(rank.session.experts.models) == bool(stays)


@pytest.mark.parametrize("waits", ["offload_model", "stream_blocks"])
@pytest.mark.parametrize("stays", [{}, {"keep_warm_seconds": 300.0}, {"more_follow": True}], ids=str)
def test_an_expert_that_waits_its_turn_takes_the_place_of_the_other(
    rank: Rank, waits: str, stays: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    held, load = [], experts.ExpertCache._load

    def watch(experts: experts.ExpertCache, *rest: Any) -> None:
        held.append({name: weights.resident_bytes for name, weights in experts.weights.items()})
        load(experts, *rest)

    monkeypatch.setattr(experts.ExpertCache, "_load", watch)
    job = rank.job(**stays, **{waits: True})
    latents = rank.run(job)
    # Nothing of the first expert is on the device while the second is loaded; nobody keeps what nobody asks for again.
    assert held == [{}, {"high_noise": 0} if stays else {}]
    rank.session = None
    assert torch.equal(latents, rank.run(rank.job()))


@pytest.mark.parametrize("stays", [{}, {"keep_warm_seconds": 300.0}], ids=str)
def test_streamed_experts_of_one_video_share_the_hosts_memory(
    rank: Rank, stays: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second takes the first one's, already locked, unless both stay."""
    taken, lock = [], streaming.BlockStream._take

    def watch(stream: streaming.BlockStream, size: int, left: list[torch.Tensor]) -> torch.Tensor:
        slab = lock(stream, size, left)
        taken.append(slab)
        return slab

    monkeypatch.setattr(streaming.BlockStream, "_take", watch)
    rank.run(rank.job(**stays, stream_blocks=True))
    places = {id(slab) for slab in taken}
    assert len(taken) > 2
    assert len(places) == (len(taken) if stays else len(taken) // 2)


@pytest.mark.parametrize("offload_model", [False, True])
def test_an_expert_that_cannot_be_read_ends_the_job_at_the_next_step(
    rank: Rank, read_late: Callable[..., None], offload_model: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any, **share: int) -> None:
        raise OSError("low.safetensors ended at byte 7, 1 bytes early")

    # Into the system's memory, or onto the device.
    monkeypatch.setattr(prefetch, "read_ahead", fail)
    if not offload_model:
        read_late(fail)
    # Of twenty steps the first fifteen are the other expert's.
    with pytest.raises(OSError, match="ended at byte 7"):
        rank.run(rank.job(steps=20, boundary=0.5, offload_model=offload_model))
    assert not any(message.startswith("denoise 15/") for message in rank.messages)


@pytest.mark.parametrize("offload_model", [False, True])
def test_a_file_that_changes_while_it_waits_is_refused(
    rank: Rank, offload_model: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = rank.job(offload_model=offload_model)
    path = tmp_path / "low.safetensors"
    path.write_bytes(Path(job.model.low_noise[0].path).read_bytes())
    model = dataclasses.replace(job.model, low_noise=(FileIdentity.of(path),))
    on_step = VideoWork.on_step

    def touch(worker: VideoWork, done: int) -> None:
        on_step(worker, done)
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr(VideoWork, "on_step", touch)
    with pytest.raises(JobError, match=r"low.safetensors changed since the job was written"):
        rank.run(dataclasses.replace(job, model=model))


def test_little_host_memory_is_not_filled_with_files(
    rank: Rank, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read: list[list[str]] = []
    monkeypatch.setattr(prefetch, "read_ahead", lambda paths, on_read, **share: read.append(paths))
    job = rank.job(offload_model=True)
    rank.run(job)
    caplog.set_level("INFO")
    monkeypatch.setattr(prefetch, "available_bytes", lambda: job.model.low_noise[0].size - 1)
    rank.session = None
    rank.run(job)
    assert read == [[job.model.low_noise[0].path], []]
    assert f"{job.model.low_noise[0].path} is not read ahead" in caplog.text
