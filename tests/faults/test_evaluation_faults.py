"""A sampling of ComfyUI's whose processes die, hang or are cancelled: between two evaluations and in one."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluating import Known, inputs
from jobs import FAULTY_WORKER, STUB_FORWARDS, agent_of, gone_within, pack_with, rank_of
from left_over import held, settled
from mount import SUPPORT
from patience import AT_ONCE, until
from wan_pack.distributed.group import worker_group
from wan_pack.distributed.group.leftovers import remove_abandoned
from wan_pack.distributed.job.errors import JobCancelled
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.launch import stopping
from wan_pack.distributed.launch.group_evaluator import GroupEvaluator, GroupEvaluators
from wan_pack.distributed.launch.launcher import JobFailed
from wan_pack.distributed.launch.pool import Pool
from wan_pack.distributed.machine.processes import Process

pytestmark = pytest.mark.processes


class Samplings:
    """On ranks without torch."""

    def __init__(self, folder: Path, pool: Pool) -> None:
        self.folder, self.pool = folder, pool
        self.model = Known.make(folder / "model")
        self.cancelled = False
        self.before = held()
        self.evaluators: list[GroupEvaluator] = []

    def open(self, **parallel: Any) -> GroupEvaluator:
        source = GroupEvaluators(
            self.pool, parent=self.folder / "jobs", failed=self.folder / "failed", cancelled=lambda: self.cancelled
        )
        evaluator = source.open(self.model.job(**{"gpu_count": 2, "keep_warm_seconds": 0.0, **parallel}))
        self.evaluators.append(evaluator)
        return evaluator

    def evaluate(self, evaluator: GroupEvaluator, seed: int = 0) -> None:
        given = inputs(self.model.config, seed)
        assert torch.equal(evaluator.evaluate(*given), given[0])

    @property
    def job(self) -> JobDir:
        (path,) = (self.folder / "jobs").glob("wan-job-*")
        return JobDir(path)

    @property
    def processes(self) -> list[Process]:
        return [agent_of(self.job), rank_of(self.job, 0), rank_of(self.job, 1)]

    def nothing_is_left(self, *processes: Process) -> None:
        assert gone_within(AT_ONCE, *processes)
        assert held() == self.before
        assert not list((self.folder / "jobs").glob("*"))
        assert self.pool.view() == []


@pytest.fixture
def samplings(tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Samplings]]:
    """Ranks that do, at evaluation `at`, what `action` says."""
    made = []

    def make(action: str = "", at: int = 0, worker: Path = STUB_FORWARDS, **more: Any) -> Samplings:
        monkeypatch.setattr(worker_group, "AGENT", pack_with(worker, tmp_path, action=action, at=at, **more))
        made.append(Samplings(tmp_path, pool))
        return made[-1]

    yield make
    for each in made:
        for evaluator in each.evaluators:
            evaluator.close()


def fails(samplings: Samplings, evaluator: GroupEvaluator) -> JobFailed:
    with pytest.raises(JobFailed) as caught:
        samplings.evaluate(evaluator)
    evaluator.close()
    return caught.value


@pytest.mark.parametrize("who", ["rank", "agent"])
def test_fault_01_10_29_a_process_killed_between_evaluations_is_named_by_the_next(
    who: str, samplings: Callable[..., Samplings]
):
    """And the sampling behind it starts on new processes."""
    here = samplings()
    evaluator = here.open()
    here.evaluate(evaluator)
    agent, _, rank = processes = here.processes
    (agent if who == "agent" else rank).kill()
    assert gone_within(AT_ONCE, rank), "a rank ends with its agent"
    started = time.monotonic()
    error = fails(here, evaluator)
    assert time.monotonic() - started < AT_ONCE
    assert str(error).startswith({"rank": "rank 1 was killed by SIGKILL", "agent": "the agent was killed by SIG"}[who])
    assert "the job is kept in" in str(error) and "distributed run" not in str(error)
    here.nothing_is_left(*processes)
    evaluator = here.open()
    here.evaluate(evaluator)
    evaluator.close()
    here.nothing_is_left()


SAID = {
    "raise": "rank 1: ValueError: the weights of layer 3 are bad\nin denoise at step 1",
    "full": "rank 1: OutOfMemoryError: CUDA out of memory",
}


@pytest.mark.parametrize("action", SAID)
def test_fault_02_03_a_rank_that_raises_in_an_evaluation_says_why(action: str, samplings: Callable[..., Samplings]):
    here = samplings(action, at=2)
    evaluator = here.open()
    here.evaluate(evaluator)
    processes = here.processes
    error = fails(here, evaluator)
    assert str(error).startswith(SAID[action]) and error.out_of_memory is (action == "full"), error
    here.nothing_is_left(*processes)


def test_fault_05_waiting_for_ComfyUI_is_no_hang_and_a_hung_evaluation_is_one(samplings: Callable[..., Samplings]):
    here = samplings("hang", at=2)
    evaluator = here.open(stall_timeout=3.0)
    here.evaluate(evaluator)
    processes = here.processes
    time.sleep(4)
    assert all(process.alive() for process in processes)
    error = fails(here, evaluator)
    assert "made no progress for 3 s in denoise at step 1" in str(error)
    assert "stall_timeout is 3 s; raise it if that is too short" in str(error)
    here.nothing_is_left(*processes)


def test_fault_05_a_batch_that_takes_longer_than_the_time_out_is_no_hang(samplings: Callable[..., Samplings]):
    """Six seconds; its samples come two at a time, one second."""
    here = samplings(seconds=0.5)
    evaluator = here.open(stall_timeout=4.0)
    given = inputs(here.model.config, 1, batch=12)
    assert torch.equal(evaluator.evaluate(*given), given[0])
    processes = here.processes
    evaluator.close()
    here.nothing_is_left(*processes)


def test_fault_06_a_rank_that_is_frozen_between_evaluations_is_found_by_the_next(samplings: Callable[..., Samplings]):
    here = samplings("hang", at=2)
    evaluator = here.open(stall_timeout=3.0)
    here.evaluate(evaluator)
    processes = here.processes
    processes[2].kill(signal.SIGSTOP)
    error = fails(here, evaluator)
    assert str(error).startswith("rank 1 made no progress for 3 s") and "it is frozen" in str(error)
    here.nothing_is_left(*processes)


@pytest.mark.parametrize(
    ("when", "warm"), [("in one", 0.0), ("in one", 600.0), ("between two", 600.0)], ids=["", "warm", "warm, between"]
)
def test_fault_07_a_cancel_ends_the_sampling_at_once(
    when: str, warm: float, samplings: Callable[..., Samplings], monkeypatch: pytest.MonkeyPatch
):
    """The stub hangs in the evaluation: warm processes have time to stop. Between two they stop at once."""
    monkeypatch.setattr(stopping, "SECONDS", 600.0)
    here = samplings("hang", at=2)
    evaluator = here.open(keep_warm_seconds=warm)
    here.evaluate(evaluator)
    processes, job = here.processes, here.job
    started = time.monotonic()
    if when == "in one":

        def cancel() -> None:
            until((job.path / "rank0-2").exists)
            here.cancelled = True

        threading.Thread(target=cancel).start()
    else:
        here.cancelled = True
        evaluator._served._thread.join(AT_ONCE)
    with pytest.raises(JobCancelled):
        here.evaluate(evaluator)
    assert time.monotonic() - started < AT_ONCE
    evaluator.close()
    here.cancelled = False
    if not warm:
        here.nothing_is_left(*processes)
        return
    assert all(process.alive() for process in processes)
    if when == "in one":
        assert job.stop.exists()
    else:
        settled()
        assert [view.idle for view in here.pool.view()] == [True] and not job.path.exists()
    assert here.pool.release() == 1
    settled()
    here.nothing_is_left(*processes)


def test_fault_07_29_a_sampling_that_is_given_up_leaves_nothing(samplings: Callable[..., Samplings]):
    """Its sampler raised between two evaluations, or was interrupted in one; or it never evaluated."""
    here = samplings()
    here.open().close()
    here.nothing_is_left()
    evaluator = here.open()
    here.evaluate(evaluator)
    processes = here.processes
    evaluator.close()
    evaluator.close()
    here.nothing_is_left(*processes)


def test_a_sampling_inside_of_another_ones_step_has_the_processes_meanwhile(samplings: Callable[..., Samplings]):
    here = samplings()
    source = GroupEvaluators(here.pool, parent=here.folder / "jobs", failed=here.folder / "failed")
    job = here.model.job(gpu_count=2, keep_warm_seconds=600.0)
    outer, inner = source.open(job), source.open(job)
    here.evaluate(outer)
    processes = here.processes
    here.evaluate(inner)
    assert here.processes == processes
    here.evaluate(inner, 1)
    inner.close()
    here.evaluate(outer, 2)
    assert here.processes == processes
    outer.close()
    assert here.pool.release() == 1
    here.nothing_is_left(*processes)


def test_the_processes_end_with_free_memory_once_the_sampling_is_over(samplings: Callable[..., Samplings]):
    here = samplings()
    evaluator = here.open(keep_warm_seconds=600.0)
    here.evaluate(evaluator)
    processes = here.processes
    assert here.pool.release() == 0
    here.evaluate(evaluator)
    evaluator.close()
    here.nothing_is_left(*processes)


def test_fault_27_ranks_that_disagree_about_an_evaluation_are_stopped(samplings: Callable[..., Samplings]):
    """Real ones: what they wait for of each other is told apart from what the sampler is waited for."""
    here = samplings("another evaluation", worker=FAULTY_WORKER)
    evaluator = here.open()
    evaluator.evaluate(*inputs(here.model.config, 0))
    processes = here.processes
    error = fails(here, evaluator)
    assert "rank 1 has another evaluation to compute than rank 0" in str(error)
    here.nothing_is_left(*processes)


PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
from mount import mount_pack
mount_pack()
from pathlib import Path
from evaluating import Known, inputs
from wan_pack.distributed.group import worker_group
from wan_pack.distributed.launch.group_evaluator import GroupEvaluators
from wan_pack.distributed.launch.pool import Pool
worker_group.AGENT = Path(sys.argv[3])
folder = Path(sys.argv[2])
model = Known.make(folder / "model")
evaluator = GroupEvaluators(Pool(), parent=folder / "jobs", failed=folder / "failed").open(model.job(gpu_count=2))
evaluator.evaluate(*inputs(model.config, 0))
(folder / "evaluated").touch()
evaluator.evaluate(*inputs(model.config, 0))
"""


def test_fault_09_everything_ends_with_comfyui_in_an_evaluation(samplings: Callable[..., Samplings], tmp_path: Path):
    """Also ranks that only wait for the next one: the first is in that loop, the other one hangs."""
    here = samplings("hang", at=2)
    with (tmp_path / "parent.log").open("wb") as log:
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(SUPPORT), str(tmp_path), str(worker_group.AGENT)], stderr=log
        )
    try:
        assert until((tmp_path / "evaluated").exists), (tmp_path / "parent.log").read_text()
        processes = here.processes
    finally:
        parent.kill()
        parent.wait(AT_ONCE)
    assert gone_within(AT_ONCE, *processes)
    remove_abandoned(tmp_path / "jobs")
    here.nothing_is_left()
