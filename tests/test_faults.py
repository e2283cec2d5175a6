"""A real agent and two gloo ranks, and what may go wrong with them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs import faulty_pack, run_tiny, tiny_job, write_embeddings
from wan_pack.distributed import group, launcher
from wan_pack.distributed.job import JobError
from wan_pack.distributed.jobdir import JobDir
from wan_pack.distributed.launcher import JobCancelled, JobFailed
from wan_pack.distributed.processes import descendants

STEPS = {"steps": 40}
"""Enough that a job is still sampling when something is done to it."""


class Watch:
    """Sees a job's phases; acts when the denoising is at a step."""

    def __init__(self, folder: Path, *, act: Callable[[JobDir], None] | None = None, step: int = 1) -> None:
        self.parent, self.act, self.step = folder / "jobs", act, step
        self.acted: float | None = None

    def __call__(self, progress: launcher.Progress) -> None:
        if self.act is not None and self.acted is None and progress.phase == "denoise" and progress.step >= self.step:
            self.acted = time.monotonic()
            self.act(self.folder())

    def folder(self) -> JobDir:
        (path,) = self.parent.glob("wan-job-*")
        return JobDir(path)


def pid_of_rank(folder: JobDir, rank: int) -> int:
    return int(folder.read_json(folder.alive(rank))["pid"])


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_models: Path) -> Callable[..., JobFailed]:
    """Runs a job with a fault and returns how it failed."""

    def run(action: str, *, rank: int = 1, step: int = 1, **settings: Any) -> JobFailed:
        monkeypatch.setattr(group, "AGENT", faulty_pack(tmp_path, action, rank=rank, step=step))
        with pytest.raises(JobFailed) as caught:
            run_tiny(tiny_job(tiny_models, **settings), tmp_path)
        return caught.value

    return run


@pytest.fixture(scope="module")
def plain(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The latents of one rank without any option."""
    result = run_tiny(tiny_job(tiny_models, gpu_count=1), tmp_path_factory.mktemp("plain"))
    yield read_latents(result.folder)
    result.remove()


def read_latents(folder: JobDir) -> Any:
    from safetensors.torch import load_file

    return load_file(folder.latents)["samples"]


@pytest.mark.parametrize(
    "settings",
    [
        {"use_fsdp": True, "offload_model": True, "memory_optimization": True},
        {"use_ulysses": False, "use_fsdp": True, "gpu_count": 3},
        {"ulysses_engine": "deepspeed", "offload_model": True},
    ],
    ids=str,
)
def test_every_layout_makes_the_same_latents(plain: Any, tiny_models: Path, tmp_path: Path, settings: dict[str, Any]):
    import torch

    result = run_tiny(tiny_job(tiny_models, **settings), tmp_path)
    torch.testing.assert_close(read_latents(result.folder), plain, rtol=1e-4, atol=1e-4)
    if settings.get("offload_model"):
        assert "low_noise expert on the device" in result.log
    result.remove()


def test_a_port_on_loopback_and_no_other_listener(tiny_models: Path, tmp_path: Path):
    """With `master_port` the store listens on 127.0.0.1 only; gloo's own listeners are there too."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    seen: set[str] = set()

    def listeners(folder: JobDir) -> None:
        seen.update(_listening({pid_of_rank(folder, rank) for rank in (0, 1)}))

    result = run_tiny(
        tiny_job(tiny_models, master_port=port, **STEPS), tmp_path, on_progress=Watch(tmp_path, act=listeners)
    )
    assert f"0100007F:{port:04X}" in seen
    assert all(address.startswith("0100007F:") for address in seen), seen
    result.remove()


def _listening(pids: set[int]) -> set[str]:
    """Local addresses, as in /proc/net/tcp, on which the processes listen."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(link)
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1])
    return found


def test_a_killed_rank_is_named_and_the_next_job_runs(tiny_models: Path, tmp_path: Path):
    watch = Watch(tmp_path, act=lambda folder: os.kill(pid_of_rank(folder, 1), signal.SIGKILL), step=3)
    with pytest.raises(
        JobFailed, match=r"^rank 1 was killed by SIGKILL, often by the system's out-of-memory"
    ) as caught:
        run_tiny(tiny_job(tiny_models, **STEPS), tmp_path, on_progress=watch)
    assert time.monotonic() - watch.acted < 2
    assert "in denoise at step" in str(caught.value)
    assert (caught.value.folder / "job.json").exists()
    run_tiny(tiny_job(tiny_models), tmp_path).remove()


def test_a_ranks_own_words_come_first(faulty: Callable[..., JobFailed]):
    error = faulty("raise")
    assert str(error).startswith("rank 1: ValueError: the weights of layer 3 are bad\nin denoise at step 2")
    assert error.rank == 1
    assert "last lines of its log" in str(error)
    assert "strike" in str(error), "the traceback"


def test_out_of_memory_is_told_apart(faulty: Callable[..., JobFailed]):
    error = faulty("oom")
    assert error.out_of_memory
    assert str(error).startswith("rank 1: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1")
    assert "use_fsdp" in str(error)
    assert "smaller size" in str(error)


def test_too_little_host_memory_while_loading(faulty: Callable[..., JobFailed]):
    error = faulty("memory")
    assert str(error).startswith("rank 1: MemoryError")
    assert "in load" in str(error)
    assert error.out_of_memory


@pytest.mark.parametrize("action", ["sleep", "stop", "ignore_term", "return", "child"])
def test_a_rank_that_stands_still_ends_the_job(faulty: Callable[..., JobFailed], action: str):
    """A deadlock, a stopped process, one deaf to SIGTERM, one that left, one with a child of its own."""
    error = faulty(action, stall_timeout=3.0)
    if action == "return":
        # gloo notices by itself; NCCL would not.
        assert error.rank == 0
        return
    assert str(error).startswith("rank 1 made no progress for 3 s in denoise at step 2 (stall_timeout is 3 s")
    if action in ("sleep", "ignore_term", "child"):
        assert "stuck_in_a_test" in str(error), "its stack is shown"


def test_ranks_that_disagree_are_stopped(faulty: Callable[..., JobFailed]):
    assert "rank 1 has another job, other inputs or other noise than rank 0" in str(faulty("fingerprint"))


def test_a_full_disk_while_writing(faulty: Callable[..., JobFailed]):
    error = faulty("disk", rank=0)
    assert "File too large" in str(error)
    assert "Free space on the disk" in str(error)


def test_secrets_and_hijacks_do_not_reach_a_rank(faulty: Callable[..., JobFailed], monkeypatch: pytest.MonkeyPatch):
    for name in ("HF_TOKEN", "PET_NPROC_PER_NODE", "PYTHON_EXEC", "RANK", "MY_SECRET"):
        monkeypatch.setenv(name, "planted")
    folder = faulty("environment").folder
    environment = json.loads((folder / "environment.json").read_text())
    assert not {"HF_TOKEN", "PET_NPROC_PER_NODE", "PYTHON_EXEC", "MY_SECRET"} & set(environment)
    assert environment["RANK"] == "1"


@pytest.mark.parametrize("after", [None, "start", "load", "denoise"])
def test_cancel_ends_everything_within_a_second(tiny_models: Path, tmp_path: Path, after: str | None):
    """Before the agent is up (None), and in each phase."""
    others = set(descendants(os.getpid()))
    state: dict[str, Any] = {"asked": 0, "cancel": None}

    def progress(progress: launcher.Progress) -> None:
        if progress.phase == after:
            state["cancel"] = time.monotonic()

    def cancelled() -> bool:
        state["asked"] += 1
        if after is None and state["asked"] == 3:
            state["cancel"] = time.monotonic()
        return state["cancel"] is not None

    with pytest.raises(JobCancelled):
        run_tiny(tiny_job(tiny_models, **STEPS), tmp_path, on_progress=progress, cancelled=cancelled)
    assert time.monotonic() - state["cancel"] < 1
    assert set(descendants(os.getpid())) <= others
    assert not list((tmp_path / "jobs").iterdir())


@pytest.mark.parametrize("stopped", [False, True])
def test_everything_dies_with_the_parent(tiny_models: Path, tmp_path: Path, stopped: bool):
    """ComfyUI killed -9, also with a rank that is stopped."""
    job = tiny_job(tiny_models, steps=1000)
    (tmp_path / "source").mkdir()
    JobDir(tmp_path / "source").write_job(job)
    write_embeddings(JobDir(tmp_path / "source").inputs)
    parent = subprocess.Popen(
        [sys.executable, str(group.AGENT), "run", str(tmp_path / "source")],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)}, cwd=tmp_path,
    )  # fmt: skip
    assert parent.stderr is not None
    for line in parent.stderr:
        if "sampling" in line and "sampling 0/" not in line:
            break
    below = descendants(parent.pid)
    assert len(below) == 3, "the agent and two ranks"
    if stopped:
        os.kill(below[-1].pid, signal.SIGSTOP)
    parent.kill()
    deadline = time.monotonic() + 1
    while any(process.alive() for process in below) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(process.alive() for process in below)
    parent.wait()
    parent.stderr.close()


def test_a_killed_agent_takes_its_ranks_along(tiny_models: Path, tmp_path: Path):
    def kill_agent(folder: JobDir) -> None:
        rank = Path(f"/proc/{pid_of_rank(folder, 0)}/stat").read_text()
        os.kill(int(rank.rpartition(")")[2].split()[1]), signal.SIGKILL)

    watch = Watch(tmp_path, act=kill_agent)
    with pytest.raises(JobFailed, match=r"^the agent was killed by SIGKILL"):
        run_tiny(tiny_job(tiny_models, **STEPS), tmp_path, on_progress=watch)
    assert time.monotonic() - watch.acted < 1.5


def test_a_file_that_changed_is_refused_by_the_ranks(tiny_models: Path, tmp_path: Path):
    job = tiny_job(tiny_models)
    vae = dataclasses.replace(job.model.vae[0], size=1)
    job = dataclasses.replace(job, model=dataclasses.replace(job.model, vae=(vae,)))
    with pytest.raises(JobFailed, match=r"rank \d: JobError: .*tiny_wan_2\.1_vae\.safetensors changed since"):
        run_tiny(job, tmp_path)


def test_run_repeats_a_job_without_comfyui(tiny_models: Path, tmp_path: Path):
    """A job from a folder, its prompt encoded inside it; the same latents both times."""
    import torch
    from wan_pack.wan.video import probe

    job = tiny_job(tiny_models, text="a red fox walks through snow")
    result = run_tiny(job, tmp_path)
    done = subprocess.run(
        [sys.executable, str(group.AGENT), "run", str(result.folder.path), "--output", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"video: {tmp_path / 'out' / 'video.mp4'}" in done.stdout
    info = probe(tmp_path / "out" / "video.mp4")
    assert (info.width, info.height, info.frames) == (64, 48, 5)
    assert torch.equal(read_latents(JobDir(tmp_path / "out")), read_latents(result.folder))
    result.remove()
    broken = subprocess.run(
        [sys.executable, str(group.AGENT), "run", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert broken.returncode == 1
    assert "job.json cannot be read" in broken.stderr
    assert issubclass(JobFailed, JobError)
