"""Groups that wait for the next job: who gets them, and how they end. Real agents over ranks without torch."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import STUB_WORKER, Watch, agent_of, gone_within, pack_with, rank_of, run_stub, stub_job
from mount import SUPPORT
from patience import AT_ONCE, COMES_UP, until
from wan_pack.distributed.group import worker_group
from wan_pack.distributed.group.leftovers import remove_abandoned
from wan_pack.distributed.job.job import Job
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.launch import launcher
from wan_pack.distributed.launch.launcher import JobFailed
from wan_pack.distributed.launch.pool import Pool
from wan_pack.distributed.machine.gpu_locks import wait_for_gpus
from wan_pack.distributed.machine.processes import Process, descendants
from wan_pack.nodes.host import groups

pytestmark = pytest.mark.processes

Run = Callable[..., list[Process]]
WARM = {"keep_warm_seconds": 600.0}


@pytest.fixture
def goes_on(tmp_path: Path) -> Path:
    """A file: while it is missing, jobs stand at step 2 of 4, to be looked at for as long as that takes."""
    (tmp_path / "goes on").touch()
    return tmp_path / "goes on"


@pytest.fixture
def run(pool: Pool, goes_on: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a good job in the pool. Returns the agent and the ranks that did it, as they were given back."""
    monkeypatch.setattr(worker_group, "AGENT", pack_with(STUB_WORKER, tmp_path, action="good", until=str(goes_on)))
    processes: list[Process] = []

    def give_back(group: worker_group.WorkerGroup, job: Job) -> None:
        agent = Process.of(group._agent.pid)
        assert agent is not None
        processes[:] = [agent, *group.ranks]
        Pool.give_back(pool, group, job)

    monkeypatch.setattr(pool, "give_back", give_back)

    def start(job: Job | None = None, **settings: Any) -> list[Process]:
        job = stub_job(**{**WARM, **settings}) if job is None else job
        run_stub(tmp_path, job, pool=pool).remove()
        return list(processes)

    return start


def alive(processes: list[Process]) -> bool:
    return all(process.alive() for process in processes)


def test_a_group_whose_folder_another_comfyui_emptied_gives_way_to_a_new_one(run: Run, pool: Pool, tmp_path: Path):
    first = run()
    # torchrun makes folders of its own in there, maybe when the job is done already.
    assert until(lambda: list((tmp_path / "jobs").glob("wan-group-*/torchrun/*/attempt_0/1")))
    shutil.rmtree(tmp_path / "jobs")
    second = run()
    assert alive(second)
    assert not set(first) & set(second)
    assert gone_within(AT_ONCE, *first)


def test_a_group_waits_until_it_is_released(run: Run, pool: Pool, tmp_path: Path):
    first = run()
    assert len(first) == 3
    assert alive(first)
    assert run(seed=5, start_timeout=30.0) == first
    started = time.monotonic()
    assert pool.release() == 1
    assert time.monotonic() - started < AT_ONCE
    assert not any(process.alive() for process in first)
    assert not list((tmp_path / "jobs").iterdir())
    assert pool.release() == 0


def test_a_job_is_over_when_its_ranks_say_so_and_not_when_it_is_looked_at_next(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    before = run()
    monkeypatch.setattr(launcher, "POLL", 3600.0)
    run()
    assert alive(before)


def test_a_group_ends_when_nobody_comes(run: Run, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given_back, give_back = [], pool.give_back

    def note(*arguments: Any) -> None:
        given_back.append(time.monotonic())
        give_back(*arguments)

    monkeypatch.setattr(pool, "give_back", note)
    processes = run(keep_warm_seconds=1.5)
    assert gone_within(AT_ONCE, *processes)
    assert time.monotonic() - given_back[0] >= 1.5
    deadline = time.monotonic() + AT_ONCE
    while list((tmp_path / "jobs").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not list((tmp_path / "jobs").iterdir())


def test_the_panel_is_told_of_groups_at_work_and_waiting_and_can_release_one(
    run: Run, pool: Pool, goes_on: Path, tmp_path: Path
):
    assert groups.shown(pool.view()) == []
    processes, seen = run(), []
    goes_on.unlink()

    def look(_: object) -> None:
        seen.extend(groups.shown(pool.view()))
        if any(group["text"] == "sampling 2/4" for group in seen):
            goes_on.touch()

    run_stub(tmp_path, stub_job(**WARM), on_progress=look, pool=pool).remove()
    working = next(group for group in seen if group["text"] == "sampling 2/4")
    assert (working["state"], working["seconds_left"], working["ends_with_job"]) == ("running", None, False)
    assert 0 < working["fraction"] < 1
    (waiting,) = groups.shown(pool.view())
    assert (waiting["id"], waiting["state"], waiting["fraction"]) == (working["id"], "warm", None)
    assert waiting["place"] == "2 CPU processes"
    assert 0 < waiting["seconds_left"] <= 600
    assert [usage["name"] for usage in waiting["usage"]] == ["rank 0", "rank 1"]
    assert all(usage["used"] > 1 << 20 for usage in waiting["usage"])
    assert pool.release("another") == 0
    assert alive(processes)
    assert pool.release(waiting["id"]) == 1
    assert not any(process.alive() for process in processes)
    assert pool.view() == []


def test_another_number_of_ranks_replaces_the_group(run: Run):
    before = run(stub_job(**WARM))
    after = run(stub_job(**WARM, gpu_count=1))
    assert alive(after)
    assert not any(process.alive() for process in before)


def test_groups_on_other_gpus_stay(run: Run, pool: Pool):
    """A crash ends the group that it happened in, and a job on some of another's GPUs replaces that one only."""
    left, right = run(gpu_ids=("0", "1")), run(gpu_ids=("2", "3"))
    assert alive([*left, *right])
    right[2].kill()
    assert gone_within(AT_ONCE, right[2])
    again = run(gpu_ids=("2", "3"))
    assert not set(again) & set(right)
    assert run(gpu_ids=("0", "1")) == left
    overlapping = run(gpu_ids=("1", "4"))
    assert not any(process.alive() for process in left)
    assert alive([*again, *overlapping])
    assert pool.release() == 2


@pytest.mark.parametrize("who", [0, 2], ids=["agent", "rank"])
def test_a_group_that_died_while_it_waited_is_replaced_silently(run: Run, who: int):
    before = run()
    before[who].kill()
    # And at once: torchrun needs a second to notice.
    assert gone_within(AT_ONCE, before[who])
    after = run()
    assert not set(before) & set(after)
    assert not any(process.alive() for process in before)


@pytest.mark.parametrize("who", [0, 2], ids=["agent", "rank"])
def test_a_group_that_dies_before_it_takes_the_job_is_replaced(
    run: Run, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: int
):
    before, submit = run(), worker_group.WorkerGroup.submit
    lines: list[str] = []

    def kill_first(self: worker_group.WorkerGroup, job: JobDir) -> None:
        before[who].kill()
        assert gone_within(AT_ONCE, before[who])
        submit(self, job)

    monkeypatch.setattr(worker_group.WorkerGroup, "submit", kill_first)
    run_stub(tmp_path, stub_job(**WARM), on_log_line=lines.append, pool=pool).remove()
    # Whoever found it first, the agent or this process.
    said = f"in new processes: before those that waited took it, {'the agent' if who == 0 else 'rank 1'} was killed by"
    assert any(said in line for line in lines), lines
    assert not any(process.alive() for process in before)
    assert pool.release() == 1


def test_groups_that_end_with_their_jobs_end_side_by_side(
    run: Run, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Letting go of a GPU's memory takes a driver seconds."""
    both, end = threading.Barrier(2), worker_group.WorkerGroup.end

    def end_together(self: worker_group.WorkerGroup) -> list[int]:
        both.wait(COMES_UP)
        return end(self)

    monkeypatch.setattr(worker_group.WorkerGroup, "end", end_together)
    (tmp_path / "jobs").mkdir()
    jobs = [stub_job(gpu_ids=ids, keep_warm_seconds=60.0) for ids in (("0", "1"), ("2", "3"))]
    taken = [pool.take(job, tmp_path / "jobs", cancelled=lambda: False, on_wait=print) for job in jobs]
    over = dataclasses.replace(jobs[0], parallel=dataclasses.replace(jobs[0].parallel, keep_warm_seconds=0.0))
    threads = [threading.Thread(target=pool.give_back, args=(one, over)) for one in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not both.broken
    assert pool.view() == []


def test_a_crash_ends_the_group_and_the_next_job_gets_a_new_one(run: Run, pool: Pool, goes_on: Path, tmp_path: Path):
    before = run()
    goes_on.unlink()
    with pytest.raises(JobFailed, match=r"^rank 1 was killed by SIGKILL"):
        run_stub(
            tmp_path, stub_job(**WARM), pool=pool, on_progress=Watch(tmp_path, lambda folder: rank_of(folder, 1).kill())
        )
    assert not any(process.alive() for process in before)
    assert pool.release() == 0
    goes_on.touch()
    assert not set(run()) & set(before)


def test_a_group_whose_words_cannot_be_kept_still_lets_its_gpus_go(
    run: Run, pool: Pool, goes_on: Path, gpu_locks_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The disk that a job has filled is full for its logs, too."""

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(worker_group.WorkerGroup, "hand_over", full)
    goes_on.unlink()
    job = stub_job(gpu_ids=("0", "1"), **WARM)
    kill = Watch(tmp_path, lambda folder: rank_of(folder, 1).kill())
    with pytest.raises(JobFailed):
        run_stub(tmp_path, job, pool=pool, on_progress=kill)
    assert pool.view() == []
    wait_for_gpus(job.parallel.gpu_ids, cancelled=lambda: True, on_wait=print, folder=gpu_locks_folder).release()


PARENT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from mount import mount_pack
mount_pack()
from pathlib import Path
import jobs
from wan_pack.distributed.group import worker_group
from wan_pack.distributed.launch.pool import Pool
worker_group.AGENT = Path(sys.argv[3])
pool = Pool()
jobs.run_stub(Path(sys.argv[2]), jobs.stub_job(keep_warm_seconds=600.0), pool=pool).remove()
print("idle", flush=True)
time.sleep(600)
"""


def test_an_idle_group_ends_with_comfyui(tmp_path: Path):
    agent = pack_with(STUB_WORKER, tmp_path, action="good")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(SUPPORT), str(tmp_path), str(agent)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    try:
        with parent.stdout:
            assert parent.stdout.readline() == "idle\n"
        process = agent_of(JobDir(tmp_path / "jobs" / "any"))
        ranks = descendants(process.pid)
        assert len(ranks) == 2
    finally:
        parent.kill()
        parent.wait()
    assert gone_within(AT_ONCE, process, *ranks)
    assert len(list((tmp_path / "jobs").glob("wan-group-*"))) == 1
    remove_abandoned(tmp_path / "jobs")
