"""Groups whose job was cancelled, whose time is over, or that one caller keeps: without processes."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jobs import stub_job
from patience import AT_ONCE, until
from wan_pack.distributed.job.errors import JobCancelled
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.launch import pool as module
from wan_pack.distributed.launch.held import HeldGroup
from wan_pack.distributed.launch.pool import Pool

WARM: dict[str, Any] = {"gpu_count": 1, "keep_warm_seconds": 600.0}


class Group:
    """In the place of a WorkerGroup."""

    def __init__(self, parallel: Any, parent: Path) -> None:
        self.folder, self.job = SimpleNamespace(path=parent / "group"), None
        self.ranks: list[Any] = []
        self.usable, self.ended, self.removed = True, 0, 0

    def end(self) -> None:
        self.ended += 1

    def remove(self) -> None:
        self.removed += 1


class Stops:
    """A pool with a group at work, whose ranks stop when they are let."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "WorkerGroup", Group)
        monkeypatch.setattr(module, "available_bytes", lambda: 50)
        monkeypatch.setattr(module, "stopped_ranks", self._stopped)
        self.go, self.asked = threading.Event(), list[Any]()
        self.ranks: list[Any] | None = ["rank 0"]
        self.parent, self.pool, self.job = folder, Pool(), stub_job(**WARM)
        self.said: list[str] = []
        self.group: Any = self.take()
        self.folder = JobDir.create(folder)

    def take(self, cancelled: Any = lambda: False) -> Any:
        return self.pool.take(self.job, self.parent, cancelled=cancelled, on_wait=self.said.append)

    def _stopped(self, *asked: Any) -> list[Any] | None:
        self.asked.append(asked)
        self.go.wait(AT_ONCE)
        return self.ranks

    def stop(self) -> None:
        self.pool.stop(self.group, self.job, self.folder, 7.0)


@pytest.fixture
def stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    stops = Stops(tmp_path, monkeypatch)
    yield stops
    stops.go.set()
    stops.pool.release()
    stops.folder.remove()


def test_ranks_that_stop_wait_for_the_next_job_which_waits_for_them(stops: Stops) -> None:
    stops.stop()
    assert stops.folder.stop.exists(), "it returns at once"
    (thread,) = [one for one in threading.enumerate() if one.name == "wan-stop"]
    assert thread.daemon and [view.idle for view in stops.pool.view()] == [False]
    looks: list[int] = []

    def cancelled() -> bool:
        looks.append(1)
        return len(looks) > 1

    with pytest.raises(JobCancelled, match="cancelled"):
        stops.take(cancelled)
    assert stops.said == ["waiting for the end of the step that was cancelled"] and len(looks) == 2
    assert stops.asked == [(stops.group, stops.job, stops.folder, 7.0)]
    stops.go.set()
    thread.join(AT_ONCE)
    assert not stops.folder.path.exists()
    (view,) = stops.pool.view()
    assert view.idle and view.ranks == ("rank 0",) and view.seconds_left
    assert stops.take() is stops.group and not stops.group.ended
    stops.pool.give_back(stops.group, stops.job)


def test_ranks_that_do_not_stop_in_time_are_ended(stops: Stops) -> None:
    stops.ranks = None
    stops.stop()
    stops.go.set()
    assert until(lambda: not stops.folder.path.exists())
    assert (stops.group.ended, stops.group.removed) == (1, 1) and stops.pool.view() == []


def test_a_group_that_is_ended_while_it_stops_is_not_given_back(stops: Stops) -> None:
    stops.stop()
    assert stops.pool.release() == 1 and stops.pool.view() == []
    stops.go.set()
    assert until(lambda: not stops.folder.path.exists())
    assert (stops.group.ended, stops.pool.view()) == (1, [])


def test_a_job_of_another_kind_does_not_wait_for_it(stops: Stops) -> None:
    """On the same machine it makes room instead."""
    stops.stop()
    other = stub_job(**WARM | {"gpu_count": 2})
    group = stops.pool.take(other, stops.parent, cancelled=lambda: True, on_wait=stops.said.append)
    assert stops.said == [] and stops.group.ended == 1
    stops.pool.give_back(group, other)


def test_a_group_whose_time_is_over_ends_unless_it_was_taken_meanwhile(stops: Stops) -> None:
    pool = stops.pool
    (member,) = pool._members
    pool._expire(member)
    assert not stops.group.ended, "it is at work"
    pool.give_back(stops.group, stops.job)
    timer = member.timer
    assert timer is not None and timer.daemon and timer.interval == 600.0
    assert (timer.function, timer.args) == (pool._expire, [member])
    assert stops.take() is stops.group and timer.finished.is_set()
    pool.give_back(stops.group, stops.job)
    pool._expire(member)
    assert stops.group.removed == 1 and pool.view() == []
    pool._expire(member)
    assert stops.group.ended == 1


class Source:
    """In the place of a pool."""

    def __init__(self) -> None:
        self.happens: list[Any] = []
        self.groups = [SimpleNamespace(usable=True, end=lambda: self.happens.append("ended")) for _ in range(3)]

    def take(self, job: Any, parent: Any, *, cancelled: Any, on_wait: Any) -> Any:
        self.happens.append(("taken", job, parent, cancelled, on_wait))
        return self.groups[sum(one[0] == "taken" for one in self.happens) - 1]

    def __getattr__(self, name: str) -> Any:
        return lambda *given: self.happens.append((name, *given))


def test_a_held_group_runs_all_jobs_and_goes_back_as_its_last_one_says() -> None:
    source: Any = Source()
    held, jobs = HeldGroup(source), ["first", "second"]
    held.close()
    how: Any = {"cancelled": bool, "on_wait": print}
    for job in jobs:
        group = held.take(job, "parent", **how)  # type: ignore[arg-type]
        held.give_back(group, job)  # type: ignore[arg-type]
    held.close()
    held.close()
    assert source.happens == [("taken", "first", "parent", bool, print), ("give_back", source.groups[0], "second")]


@pytest.mark.parametrize("how", ["died while it waited", "stopped", "forgotten"])
def test_a_held_group_that_is_gone_is_replaced(how: str) -> None:
    source: Any = Source()
    held = HeldGroup(source)
    given: Any = ("job", "parent")
    group: Any = held.take(*given, cancelled=bool, on_wait=print)
    held.give_back(group, "job")  # type: ignore[arg-type]
    if how == "died while it waited":
        group.usable = False
    elif how == "stopped":
        held.stop(group, "job", "folder", 3.0)  # type: ignore[arg-type]
    else:
        held.forget(group)
    assert held.take(*given, cancelled=bool, on_wait=print) is source.groups[1]  # type: ignore[comparison-overlap]
    between = {
        "died while it waited": ["ended", ("forget", group)], "stopped": [("stop", group, "job", "folder", 3.0)],
        "forgotten": [("forget", group)],
    }[how]  # fmt: skip
    assert source.happens[1:-1] == between and source.happens[-1][0] == "taken"


def test_over_several_machines_each_waits_for_its_own_gpus(stops: Stops, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here none are taken, nor looked at."""
    asked: list[Any] = []
    made: list[Any] = []

    def hosts_group(job: Any, parent: Path) -> Group:
        made.append((job, parent))
        return Group(job.parallel, parent)

    monkeypatch.setattr(module, "HostsGroup", hosts_group)
    monkeypatch.setattr(module, "list_gpus", lambda: pytest.fail("of no interest"))
    locks = SimpleNamespace(release=bool)
    monkeypatch.setattr(module, "wait_for_gpus", lambda gpus, **how: (asked.append((gpus, *how.values())), locks)[1])
    job = stub_job(hosts=("a", "b"), gpu_ids=("0",), gpu_count=2)
    group = stops.pool.take(job, stops.parent, cancelled=bool, on_wait=print)
    assert made == [(job, stops.parent)] and asked == [((), bool, print)]
    stops.pool.give_back(group, job)
    assert group.removed == 1  # type: ignore[attr-defined]


def test_gpus_of_a_job_are_waited_for_and_their_free_memory_is_noted(
    stops: Stops, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[int] = []
    asked: list[Any] = []
    monkeypatch.setattr(
        module, "wait_for_gpus",
        lambda gpus, **how: (asked.append((gpus, how)), SimpleNamespace(release=lambda: released.append(1)))[1],
    )  # fmt: skip
    gpus = [SimpleNamespace(index=index, free_bytes=size) for index, size in (("0", 5), ("1", 7), ("2", 9))]
    monkeypatch.setattr(module, "list_gpus", lambda: gpus)
    job = stub_job(gpu_ids=("2", "0"))
    group = stops.pool.take(job, stops.parent, cancelled=bool, on_wait=print)
    member = stops.pool._members[-1]
    assert asked == [(("2", "0"), {"cancelled": bool, "on_wait": print})]
    assert member.free_bytes == {"0": 5, "2": 9} and member.host_bytes == 50 and member.parallel == job.parallel
    stops.pool.forget(group)
    assert released == [1] and group.removed == 1  # type: ignore[attr-defined]
