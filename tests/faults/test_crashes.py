"""Ranks that die or raise, and what the user is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import Watch, rank_of, run_stub, run_tiny, tiny_job
from patience import AT_ONCE
from wan_pack.distributed.group.failures import RankFailure, root_cause
from wan_pack.distributed.launch.launcher import JobFailed

OWN_WORDS = "rank 1: ValueError: the weights of layer 3 are bad"


@pytest.mark.processes
def test_fault_01_a_killed_rank_is_named_and_the_next_job_runs(
    fails: Callable[..., JobFailed], stub_pack: Callable[..., None], tmp_path: Path
):
    watch = Watch(tmp_path, lambda folder: rank_of(folder, 1).kill())
    error = fails("stand still", {"on_progress": watch})
    assert watch.seconds_ago < AT_ONCE
    assert str(error).startswith("rank 1 was killed by SIGKILL, often by the system's out-of-memory killer")
    assert "in denoise at step 2" in str(error)
    assert error.folder is not None and str(error.folder) in str(error)
    assert (error.folder / "logs" / "rank1.log").exists()
    assert (error.folder / "job.json").exists()
    stub_pack("good")
    run_stub(tmp_path).remove()


@pytest.mark.processes
def test_fault_01_a_segmentation_fault_is_named(fails: Callable[..., JobFailed]):
    error = fails("segfault")
    assert str(error).startswith("rank 1 was killed by SIGSEGV")
    assert "Fatal Python error: Segmentation fault" in str(error), "its stack is in the log"


@pytest.mark.processes
def test_fault_02_the_headline_is_never_a_peers_echo(fails: Callable[..., JobFailed]):
    """The two ranks end in either order, and mostly within the same second."""
    for seconds in (0.0, 0.08):
        error = fails("echo", fault={"echo_after": seconds})
        assert str(error).startswith(f"{OWN_WORDS}\nin denoise at step 2"), f"{seconds} s"
        assert error.rank == 1
    assert "last lines of its log" in str(error)
    assert str(error).count("in fail") == 1, "the traceback"


@pytest.mark.processes
def test_fault_02_an_abort_after_a_peers_error_is_not_the_cause(fails: Callable[..., JobFailed]):
    assert str(fails("abort")).startswith(OWN_WORDS)


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
def test_fault_02_the_cause_comes_before_its_echoes(failures: list[RankFailure], rank: int):
    assert root_cause(failures).rank == rank
    assert root_cause(failures[::-1]).rank == rank


def test_fault_10_what_ranks_say_of_a_killed_agents_end_is_not_the_cause():
    echo = failure(0, type="RuntimeError", message="Connection closed by peer [127.0.0.1]:4242")
    own = failure(1, type="ValueError", message="bad")
    assert root_cause([echo], agent_failed=True) is None
    assert root_cause([echo], agent_failed=False) == echo
    assert root_cause([echo, own], agent_failed=True) == own, "it failed before its agent did"


@pytest.mark.processes
def test_fault_03_gpu_memory_that_runs_out_is_told_apart(faulty: Callable[..., JobFailed]):
    """Real ranks: the other one waits in a collective."""
    error = faulty("gpu memory")
    assert error.out_of_memory, "the node raises ComfyUI's own exception then"
    assert str(error).startswith("rank 1: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1")
    assert "use_fsdp" in str(error)
    assert "smaller size" in str(error)


@pytest.mark.processes
def test_fault_04_host_memory_that_runs_out_while_loading(fails: Callable[..., JobFailed]):
    error = fails("host memory")
    assert str(error).startswith("rank 1: MemoryError")
    assert "in load" in str(error)
    assert error.out_of_memory


@pytest.mark.processes
def test_fault_04_a_rank_killed_while_loading(fails: Callable[..., JobFailed]):
    error = fails("killed while loading")
    assert str(error).startswith("rank 1 was killed by SIGKILL, often by the system's out-of-memory killer\nin load")
    assert "use_fsdp on, so that host memory holds less" in str(error)


@pytest.mark.processes
def test_fault_27_ranks_that_disagree_are_stopped(faulty: Callable[..., JobFailed]):
    assert "rank 1 has another job, other inputs or other noise than rank 0" in str(faulty("noise"))


@pytest.mark.processes
def test_fault_21_a_file_that_changed_is_refused_by_the_ranks(tiny_models: Path, tmp_path: Path):
    job = tiny_job(tiny_models, gpu_count=1)
    vae = dataclasses.replace(job.model.vae[0], size=1)
    job = dataclasses.replace(job, model=dataclasses.replace(job.model, vae=(vae,)))
    with pytest.raises(JobFailed, match=r"rank 0: JobError: .*tiny_wan_2\.1_vae\.safetensors changed since"):
        run_tiny(job, tmp_path)


@pytest.mark.processes
def test_fault_17_a_video_of_nan_is_not_a_result(tiny_models: Path, tmp_path: Path):
    import torch
    from safetensors.torch import save_file
    from wan_pack.distributed.launch.launcher import run_job

    def nan(path: Path) -> None:
        save_file({name: torch.full((3, 64), float("nan")) for name in ("context", "context_null")}, path)

    with pytest.raises(JobFailed, match=r"^rank 0: JobError: the denoised latents are not finite"):
        run_job(tiny_job(tiny_models, gpu_count=1, steps=2), nan, parent=tmp_path / "jobs", failed=tmp_path / "failed")
