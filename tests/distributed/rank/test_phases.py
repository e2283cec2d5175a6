"""The phases of a job on a rank, in order: what each begins with, tells and leaves."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import FILE, stub_job
from safetensors.torch import load_file
from wan_pack.distributed.job.job import ForwardsJob, JobError, VaeJob
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.launch.launcher import new_job_id
from wan_pack.distributed.rank import video_work, work, worker
from wan_pack.distributed.rank.forwards_work import ForwardsWork
from wan_pack.distributed.rank.session import Stopped
from wan_pack.distributed.rank.signs import RankFiles
from wan_pack.distributed.rank.vae_work import VaeWork
from wan_pack.distributed.rank.video_work import VideoWork
from wan_pack.wan.vae.latents import denormalise

CPU = torch.device("cpu")


def jobs() -> list[Any]:
    parallel, shapes = stub_job(gpu_count=1).parallel, {"given": (1, 16, 1, 2, 2), "made": (1, 3, 1, 16, 16)}
    return [
        stub_job(gpu_count=1), ForwardsJob(id=new_job_id(), model=(FILE,), parallel=parallel),
        VaeJob(id=new_job_id(), vae=(FILE,), encode=False, parallel=parallel, **shapes),
    ]  # fmt: skip


def test_each_kind_of_job_has_its_work(tmp_path: Path) -> None:
    session: Any = SimpleNamespace(rank=2, device=CPU)
    for job, kind in zip(jobs(), (VideoWork, ForwardsWork, VaeWork), strict=True):
        folder = JobDir(tmp_path)
        made = worker.work_of(job, "group", folder, "files", session)  # type: ignore[arg-type]
        assert type(made) is kind and (made.job, made.group, made.folder) == (job, "group", folder)
        assert (made.files, made.session, made.rank, made.device) == ("files", session, 2, CPU)


class Held:
    """In the place of a session."""

    def __init__(self, happens: list[Any]) -> None:
        self.rank, self.world, self.device, self.mesh = 1, 2, CPU, None
        self.experts = SimpleNamespace(settle=lambda: happens.append("settles"))
        self.rest, self.leave = (lambda: happens.append("rests")), lambda: happens.append("leaves")
        self.begin = lambda job, group: happens.append((job.id, group))
        self.memory = lambda: ", 3 GiB"


class Files:
    """In the place of a RankFiles."""

    def __init__(self, happens: list[Any]) -> None:
        self.happens = happens

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        self.happens.append(name)
        yield

    def error(self, error: BaseException) -> None:
        self.happens.append(error)

    def progress(self, *given: Any, message: str) -> None:
        self.happens.append((*given, message))


@pytest.mark.parametrize("ends", ["well", "stopped", "badly"])
@pytest.mark.parametrize("first", [True, False])
def test_a_rank_keeps_its_session_unless_a_job_ends_badly(
    ends: str, first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error is kept before it leaves the others, which may take long."""
    happens: list[Any] = []
    held, files, folder = Held(happens), Files(happens), JobDir.create(tmp_path)
    folder.write_job(stub_job(gpu_count=1))
    error = ValueError("no")

    def run() -> None:
        happens.append("runs")
        assert not torch.is_grad_enabled()
        if ends != "well":
            raise Stopped if ends == "stopped" else error

    def work_of(job: Any, *given: Any) -> Any:
        assert job == folder.read_job() and given == ("group", folder, files, held)
        return SimpleNamespace(run=run)

    monkeypatch.setattr(worker, "work_of", work_of)
    monkeypatch.setattr(worker, "Session", SimpleNamespace(of=lambda job: held))
    asked: Any = ("group", folder, files, None if first else held)
    if ends == "badly":
        with pytest.raises(ValueError, match="no"):
            worker.main(*asked)
    else:
        assert worker.main(*asked) is held
    behind = {"well": ["rests"], "stopped": ["settles", "rests"], "badly": [error, "leaves"]}[ends]
    assert happens == ["device and kernels chosen"] * first + ["runs", *behind]
    folder.remove()


def a_work(happens: list[Any], folder: Any = None) -> Any:
    return worker.work_of(stub_job(gpu_count=1), "group", folder, Files(happens), Held(happens))  # type: ignore[arg-type]


def test_a_job_begins_with_the_files_that_it_was_written_for(monkeypatch: pytest.MonkeyPatch) -> None:
    happens: list[Any] = []
    made = a_work(happens)
    looked: list[str] = []
    monkeypatch.setattr(type(FILE), "check_unchanged", lambda file: looked.append(file.path))
    made.begin()
    assert looked == [file.path for file in made.job.files] and looked
    assert happens == ["ranks meet", (made.job.id, "group")]


def test_a_phase_is_told_and_timed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    happens: list[Any] = []
    made, clock = a_work(happens), iter([5.0, 7.5])
    monkeypatch.setattr(work, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with caplog.at_level(logging.INFO), made.phase("load", "words"):
        assert happens == [("load", 0, 0, "words")]
    assert made.phase_seconds == {"load": 2.5} and len(happens) == 1
    assert caplog.messages == ["begins", "took 2.50 s, 3 GiB"]


def test_the_first_rank_with_another_job_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = JobDir.create(tmp_path)
    folder.job.write_bytes(b"a job")
    made, gathered = a_work([], folder), []
    made.check_same_job()
    made.session.mesh = object()
    own = hashlib.sha256(b"a job").digest()
    for everyone, words in (
        ([own, own], ""), ([own, b"x", b"y"], "rank 1 has another job than rank 0"),
        ([own, own, b"x"], "rank 2 has another job than rank 0"),
    ):  # fmt: skip
        monkeypatch.setattr(work, "gather_bytes", lambda *given, all=everyone: (gathered.append(given), all)[1])
        if words:
            with pytest.raises(JobError, match=f"^{words}$"):
                made.check_same_job()
        else:
            made.check_same_job()
    assert gathered == [(own, CPU)] * 3
    folder.remove()


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("kept", [True, False])
def test_a_video_is_encoded_denoised_and_finished_or_taken_up_behind_that(waits: bool, kept: bool) -> None:
    happens: list[Any] = []
    made = a_work(happens)
    latents = torch.zeros(2)
    made.begin = lambda: happens.append("begins")
    made.prepare = lambda: happens.append("prepares")
    made.check_ranks_agree = lambda: happens.append("agrees")
    made.kept_latents = lambda: latents if kept else None
    made.texts = lambda: (happens.append("texts"), "texts")[1]
    made.needed = lambda: ["high_noise", "low_noise"]
    made.start = SimpleNamespace(
        look=lambda: happens.append("looks"), conditioning=lambda: happens.append("pictures"),
        waits_for_reading=lambda experts: (happens.append(experts), waits)[1],
    )  # fmt: skip
    made.denoised = lambda texts: (happens.append(texts), latents)[1]
    made.finish = lambda given: happens.append(given is latents)
    made.run()
    encoded = [("encode", 0, 0, ""), "texts", "looks", 2, *["pictures"] * (not waits), "texts"]
    start = ("start", 0, 0, "connecting the processes")
    assert happens == [start, "begins", "prepares", "agrees", *([] if kept else encoded), True]
    assert list(made.phase_seconds) == ["start", *([] if kept else ["encode"])]


def test_the_experts_that_run_are_needed_the_high_noise_one_first() -> None:
    made = a_work([])
    made.solver = SimpleNamespace(timesteps=[950, 900, 300, 100])
    made.guidance = SimpleNamespace(expert=lambda timestep: "high_noise" if timestep >= 900 else "low_noise")
    for steps, names in (
        (range(4), ["high_noise", "low_noise"]),
        (range(2), ["high_noise"]),
        (range(2, 4), ["low_noise"]),
    ):
        made.steps = steps
        assert made.needed() == names


@pytest.mark.parametrize(("rank", "preview", "shown"), [(0, True, True), (0, False, False), (1, True, False)])
def test_while_weights_are_read_all_else_is_done(rank: int, preview: bool, shown: bool) -> None:
    happens: list[Any] = []
    made = a_work(happens)
    made.rank, made.job = rank, SimpleNamespace(preview=preview)
    made.start = SimpleNamespace(conditioning=lambda: happens.append("pictures"))
    made.session.get_ready = lambda *given: happens.append(given)
    made.session.preview_map = lambda job: (happens.append("fitted"), "map")[1]
    made.files.say = happens.append
    made.while_reading("model", "shard")
    ready = ("model", made.job, "shard", made.files.span)
    fitted = ["preparing the live picture", "live picture prepared", "fitted"]
    assert happens == [ready, "pictures", *(fitted if shown else []), "rests"]
    assert made.preview_map() == ("map" if shown else None) and happens.count("fitted") == shown


@pytest.mark.parametrize(("rank", "decodes"), [(0, True), (0, False), (1, True)])
def test_rank_0_keeps_the_latents_before_they_are_decoded_and_tells_of_all_at_last(
    rank: int, decodes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ComfyUI's, with a batch of one; those of a model's tokens are not in the order of memory."""
    folder, happens = JobDir.create(tmp_path), []
    made = a_work(happens, folder)
    made.rank, made.notes, made.reused, made.step_seconds = rank, ["cut"], [2], [1.5]
    made.job = SimpleNamespace(decode=decodes, id="0f")
    made.files.spans = [("process", 1.0, 2.0)]
    latents = torch.randn(3, 2, 4, 16).permute(3, 0, 1, 2)

    def decode(given: torch.Tensor) -> int:
        assert given is latents and folder.latents.exists() is (rank == 0)
        return 9

    made.decode = decode
    monkeypatch.setattr(video_work, "gather_peaks", lambda session: [[1, 2]])
    monkeypatch.setattr(video_work, "video_of", lambda job, session, **told: {"made": told})
    monkeypatch.setattr(video_work, "result_of", lambda job, session, **told: told)
    made.finish(latents)
    if rank == 0:
        (samples,) = load_file(folder.latents).values()
        assert torch.equal(samples, denormalise(latents[None], 16)) and samples.dtype == torch.float32
        assert json.loads(folder.result.read_text()) == {
            "phases": {}, "step_seconds": [1.5], "peaks": [[1, 2]], "spans": [["process", 1.0, 2.0]], "reused": [2],
            "notes": ["cut"], "made": {"frames": 9 if decodes else 0, "latents_shape": [1, 16, 3, 2, 4]},
        }  # fmt: skip
    assert folder.result.exists() is folder.latents.exists() is (rank == 0)
    assert not list(folder.path.glob("*.tmp"))
    folder.remove()


def test_what_a_rank_says_is_of_its_phase_and_the_log_has_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of what is counted only the file is told."""
    folder = JobDir.create(tmp_path)
    files = RankFiles(folder, 0)
    files.progress("encode", 3, 4, seconds_per_step=1.5)
    shown = {"phase": "encode", "step": 3, "total": 4, "seconds_per_step": 1.5, "message": ""}
    assert folder.read_json(folder.progress) == shown
    alive = folder.read_json(folder.alive(0))
    assert (alive["phase"], alive["step"]) == ("encode", 3) and alive.keys() == {"pid", "started", "phase", "step"}
    with caplog.at_level(logging.INFO):
        files.say("loading")
        files.say("high_noise expert", 2, 9)
        files.say("")
    assert caplog.messages == ["loading"]
    assert folder.read_json(folder.progress) == {
        "phase": "encode", "step": 0, "total": 0, "seconds_per_step": None, "message": "",
    }  # fmt: skip
    other = RankFiles(folder, 1)
    folder.progress.unlink()
    other.progress("load", 1, 2)
    assert not folder.progress.exists() and folder.read_json(folder.alive(1))["phase"] == "load"
    folder.remove()
