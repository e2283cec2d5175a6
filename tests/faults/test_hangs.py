"""Ranks that stand still, are frozen, do not listen, or leave without a word."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from jobs import FAKE_AGENT, Watch, run_stub, stub_job
from patience import AT_ONCE
from wan_pack.distributed.group import signs_of_life, worker_group
from wan_pack.distributed.job.progress import Progress
from wan_pack.distributed.launch.launcher import JobFailed, Result
from wan_pack.distributed.machine.gpu_locks import wait_for_gpus

pytestmark = pytest.mark.processes


def seconds_without_a_sign(error: JobFailed) -> float:
    """By its ranks' files: when this process saw their last sign of life says nothing of when that was."""
    assert error.folder is not None
    return time.time() - max(path.stat().st_mtime for path in error.folder.glob("rank*.alive"))


def test_fault_05_a_rank_that_hangs_is_named_with_its_stack(faulty: Callable[..., JobFailed]):
    """Real ranks: the other one waits for it in a collective, and is not the suspect."""
    error = faulty("sleep", stall_timeout=6.0)
    assert str(error).startswith("rank 1 made no progress for 6 s in denoise at step 2 (stall_timeout is 6 s")
    assert "stuck_in_a_test" in str(error), "its stack is shown"
    assert "rank 0: denoise at step" in str(error)


def test_fault_05_the_end_comes_in_time_and_the_rank_behind_is_suspected(
    fails: Callable[..., JobFailed], tmp_path: Path
):
    watch = Watch(tmp_path)
    error = fails("behind", {"on_progress": watch}, stall_timeout=3.0)
    assert watch.seconds_ago < AT_ONCE and seconds_without_a_sign(error) > 2.7
    assert str(error).startswith("rank 1 made no progress for 3 s in denoise at step 2 (stall_timeout is 3 s")
    assert "rank 0: denoise at step 3" in str(error)
    assert "stand_still" in str(error), "its stack is shown"


@pytest.mark.parametrize("action", ["stop", "deaf"])
def test_fault_06_a_frozen_or_deaf_rank_is_ended_as_soon(fails: Callable[..., JobFailed], tmp_path: Path, action: str):
    watch = Watch(tmp_path)
    error = fails(action, {"on_progress": watch}, stall_timeout=4.0)
    assert watch.seconds_ago < AT_ONCE and seconds_without_a_sign(error) > 3.7
    if action == "stop":
        assert str(error).startswith("rank 1 made no progress for 4 s in denoise at step 2")
        assert "it is frozen: a signal (SIGSTOP) or a debugger stopped it" in str(error)


@pytest.mark.parametrize("action", ["frozen peer", "deaf peer"])
def test_fault_06_a_failure_is_not_held_up_by_a_rank_that_does_not_end(
    fails: Callable[..., JobFailed], tmp_path: Path, action: str
):
    """torchrun alone waits 30 s for it, and then its SIGKILL looks like the cause."""
    watch = Watch(tmp_path, lambda folder: (tmp_path / "seen").touch())
    error = fails(action, {"on_progress": watch}, fault={"until": str(tmp_path / "seen")})
    assert watch.seconds_ago < AT_ONCE
    assert str(error).startswith("rank 1: ValueError: the weights of layer 3 are bad")


def test_fault_11_a_start_that_never_ends_names_its_setting(run_fake: Callable[..., Result]):
    started = time.monotonic()
    with pytest.raises(JobFailed, match=r"^rank 0 did not finish loading for 1 s .*start_timeout is 1 s; raise it"):
        run_fake("sleep", start_timeout=1.0)
    assert 0.9 < time.monotonic() - started < AT_ONCE


def test_fault_28_a_rank_that_returns_early_is_a_failure(fails: Callable[..., JobFailed], tmp_path: Path):
    """It exits with 0, which torchrun does not mind; with NCCL the others would wait for it."""
    watch = Watch(tmp_path, lambda folder: (tmp_path / "seen").touch())
    error = fails("return", {"on_progress": watch}, fault={"until": str(tmp_path / "seen")})
    assert watch.seconds_ago < AT_ONCE
    assert re.match(r"rank 1 ended( with exit code 0)? and left no error\nin denoise at step 2", str(error))


def test_fault_11_waiting_for_a_gpu_is_not_part_of_the_start(
    gpu_locks_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Another program may compute for an hour; start_timeout is about this job's own processes."""
    monkeypatch.setattr(worker_group, "AGENT", FAKE_AGENT)
    other = wait_for_gpus(["0"], cancelled=lambda: False, on_wait=lambda text: None)
    hours, told = [0.0], []
    monkeypatch.setattr(signs_of_life, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 3600 * hours[-1]))

    def tell(progress: Progress) -> None:
        told.append(progress.text)
        if "waiting for GPU 0, in use by process" in progress.text:
            hours.append(1.0)
            other.release()

    job = stub_job(gpu_count=1, gpu_ids=("0",))
    run_stub(tmp_path, job, lambda path: path.write_text("good"), on_progress=tell).remove()
    assert hours[-1] == 1.0, told
