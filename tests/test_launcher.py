"""The launcher against a fake agent: what it accepts, refuses, bounds and leaves behind."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import FAKE_AGENT, tiny_job
from wan_pack.distributed import group, launcher
from wan_pack.distributed.environment import child_environment
from wan_pack.distributed.failures import RankFailure, root_cause
from wan_pack.distributed.job import JobError, Parallel
from wan_pack.distributed.jobdir import JobDir
from wan_pack.distributed.launcher import JobCancelled, JobFailed, Result, run_job
from wan_pack.distributed.leftovers import claim, remove_abandoned
from wan_pack.distributed.logs import clean_lines
from wan_pack.distributed.progress import SHARES, Progress


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_models: Path) -> Callable[..., Result]:
    """Runs a job whose agent does what `mode` says."""
    monkeypatch.setattr(group, "AGENT", FAKE_AGENT)

    def start(mode: str, *, callbacks: dict[str, Any] | None = None, **settings: Any) -> Result:
        job = tiny_job(tiny_models, **settings)
        return run_job(
            job, lambda path: path.write_text(mode), parent=tmp_path / "jobs", failed=tmp_path / "failed",
            **(callbacks or {}),
        )  # fmt: skip

    return start


def test_success_and_removal(run: Callable[..., Result], tmp_path: Path):
    result = run("good")
    assert result.folder.video.exists()
    result.remove()
    assert not list((tmp_path / "jobs").iterdir())


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("nothing", r"result\.json cannot be read"),
        ("other id", "is of job '00'"),
        ("wrong shape", "not what result"),
        ("no video", r"video\.mp4 is missing"),
        ("fail", "the agent ended with exit code 1"),
        ("die", "the agent was killed by SIGKILL"),
    ],
)
def test_only_a_whole_result_is_success(run: Callable[..., Result], tmp_path: Path, mode: str, words: str):
    with pytest.raises(JobFailed, match=words) as caught:
        run(mode)
    assert caught.value.folder is not None
    assert caught.value.folder.parent == tmp_path / "failed"
    assert str(caught.value.folder) in str(caught.value)
    assert not list((tmp_path / "jobs").iterdir())


def test_start_timeout_names_its_setting(run: Callable[..., Result]):
    started = time.monotonic()
    with pytest.raises(JobFailed, match=r"start_timeout is 1 s"):
        run("sleep", start_timeout=1.0)
    assert 0.9 < time.monotonic() - started < 4


def test_cancel_is_quick_and_leaves_nothing(run: Callable[..., Result], tmp_path: Path):
    ask_again = iter([False, False, True])
    started = time.monotonic()
    with pytest.raises(JobCancelled):
        run("sleep", callbacks={"cancelled": lambda: next(ask_again)})
    assert time.monotonic() - started < 1
    assert not list((tmp_path / "jobs").iterdir())
    assert not (tmp_path / "failed").exists()


def test_cancel_before_the_start_starts_nothing(run: Callable[..., Result], tmp_path: Path):
    with pytest.raises(JobCancelled):
        run("sleep", callbacks={"cancelled": lambda: True})
    assert not (tmp_path / "jobs").exists()


def test_an_exception_of_the_caller_ends_the_job(run: Callable[..., Result], tmp_path: Path):
    class InterruptProcessing(BaseException):
        pass

    def interrupt() -> bool:
        raise InterruptProcessing

    calls = iter([lambda: False, interrupt])
    with pytest.raises(InterruptProcessing):
        run("sleep", callbacks={"cancelled": lambda: next(calls)()})
    assert not list((tmp_path / "jobs").iterdir())


def test_a_flood_of_log_is_bounded(run: Callable[..., Result]):
    """About 200 MB, binary, with redrawn progress bars and no newline at the end."""
    lines: list[str] = []
    started = time.monotonic()
    result = run("flood", callbacks={"on_log_line": lines.append})
    assert time.monotonic() - started < 10
    assert len(result.log) <= launcher.MAX_LOG
    assert result.log.endswith("the end without a newline")
    assert len(lines) < 50_000
    assert all(len(line) <= launcher.MAX_LOG for line in lines)
    result.remove()


def test_redrawn_lines_collapse():
    assert clean_lines(b"10%\r 50%\r100%\nnext\r\n\xff\n\n") == ["100%", "next", "\ufffd"]


def test_failing_jobs_leave_no_descriptors_or_threads(run: Callable[..., Result], tmp_path: Path):
    with pytest.raises(JobFailed):
        run("fail")
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(20):
        with pytest.raises(JobFailed):
            run("fail")
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert len(list((tmp_path / "failed").iterdir())) == 5, "only the newest five are kept"
    run("good").remove()


def test_a_taken_port_is_named(run: Callable[..., Result]):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(JobError, match=rf"master_port is {port}, .* Choose another port, or 0"):
            run("good", master_port=port)
    run("good", master_port=port).remove()


def test_a_full_disk_is_named_before_the_start(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch):
    usage = launcher.shutil.disk_usage("/")
    monkeypatch.setattr(launcher.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(JobError, match=r"has 1 MiB free; the job needs \d+ MiB"):
        run("good")


def test_other_systems_are_refused_in_plain_words(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(JobError, match="this system is win32; videos are made on Linux"):
        run("good")


def test_abandoned_folders_are_removed_and_live_ones_are_not(tmp_path: Path):
    abandoned, live, young = (JobDir.create(tmp_path) for _ in range(3))
    claim(live)
    claim(abandoned)
    assert abandoned.lock is not None
    abandoned.lock.close()  # As the kernel does when its holder dies.
    remove_abandoned(tmp_path)
    assert not abandoned.path.exists()
    assert live.path.exists()
    assert young.path.exists()
    os.utime(young.path, (0, 0))
    remove_abandoned(tmp_path)
    assert not young.path.exists()


def test_the_environment_is_an_allowlist(tmp_path: Path):
    planted = {
        "PATH": "/bin", "HOME": "/home/me", "HF_TOKEN": "secret", "NCCL_DEBUG": "INFO", "AWS_SECRET_ACCESS_KEY": "s",
        "PET_NPROC_PER_NODE": "1", "PYTHON_EXEC": "/bin/echo", "RANK": "7", "MASTER_ADDR": "evil", "LD_PRELOAD": "x",
        "PYTHONPATH": "/evil", "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync,expandable_segments:True",
        "PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync", "TORCH_HUB_TOKEN": "secret", "OMP_NUM_THREADS": "3",
    }  # fmt: skip
    child = child_environment(Parallel(gpu_count=2, gpu_ids=("4", "1")), tmp_path, planted)
    assert child["CUDA_VISIBLE_DEVICES"] == "4,1"
    assert child["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert (child["PATH"], child["NCCL_DEBUG"], child["OMP_NUM_THREADS"]) == ("/bin", "INFO", "3")
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PET_NPROC_PER_NODE", "PYTHON_EXEC", "RANK", "MASTER_ADDR",
                 "LD_PRELOAD", "PYTHONPATH", "PYTORCH_ALLOC_CONF", "TORCH_HUB_TOKEN"):  # fmt: skip
        assert name not in child, name


def test_nothing_a_user_typed_is_on_the_command_line(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    seen: list[list[str]] = []
    popen = group.subprocess.Popen
    monkeypatch.setattr(group.subprocess, "Popen", lambda argv, **kw: seen.append(argv) or popen(argv, **kw))
    run("good", text="--nproc-per-node=9 ${local_rank} $(id)").remove()
    ((python, unbuffered, agent, role, folder),) = seen
    assert (python, unbuffered, agent, role) == (sys.executable, "-u", str(FAKE_AGENT), "agent")
    assert Path(folder).parent == tmp_path / "jobs"


def failure(rank: int, **fields: Any) -> RankFailure:
    return RankFailure(rank=rank, **fields)


@pytest.mark.parametrize(
    ("failures", "rank"),
    [
        # The victim's echo carries the earlier time; torch would name it.
        ([failure(0, type="RuntimeError", message="Connection closed by peer [127.0.0.1]:4242", time_ns=1),
          failure(1, type="torch.OutOfMemoryError", message="CUDA out of memory", time_ns=2)], 1),
        ([failure(0, type="RuntimeError", message="Timed out waiting", time_ns=1), failure(1, signal="SIGKILL")], 1),
        ([failure(0, signal="SIGTERM"), failure(1, type="ValueError", message="bad", time_ns=5)], 1),
        ([failure(0, type="ValueError", message="b", time_ns=9), failure(1, type="ValueError", time_ns=3)], 1),
        ([failure(0, signal="SIGTERM"), failure(1, exitcode=3)], 1),
        # gloo aborts the victim now and then.
        ([failure(0, signal="SIGABRT"), failure(1, type="ValueError", message="bad", time_ns=5)], 1),
        # The agent killed what did not end.
        ([failure(0, signal="SIGKILL", seconds=103), failure(1, signal="SIGSEGV", seconds=100)], 1),
        ([failure(0, signal="SIGKILL", seconds=103), failure(1, type="ValueError", message="bad", seconds=100)], 1),
        # It speaks of a time-out, but it is the rank's own error.
        ([failure(0, type="KeyError", message="timeout", time_ns=1),
          failure(1, type="RuntimeError", message="Connection closed by peer", time_ns=0)], 0),
    ],
)  # fmt: skip
def test_the_cause_comes_before_its_echoes(failures: list[RankFailure], rank: int):
    assert root_cause(failures).rank == rank
    assert root_cause(failures[::-1]).rank == rank


def test_progress_is_one_bar_and_one_line():
    fractions = [Progress(phase=phase, step=step, total=4).fraction for phase in SHARES for step in range(5)]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert fractions[-1] == pytest.approx(1)
    text = Progress(phase="denoise", step=4, total=40, seconds_per_step=12.3).text
    assert text == "sampling 4/40 - 12.30 s/it - ETA 7:23"
    assert Progress(phase="load", step=2, total=8, message="low_noise expert").text == "loading 2/8 - low_noise expert"
    assert Progress(phase="something new").fraction == 0
