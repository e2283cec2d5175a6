"""Which job folders stay, and which go."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import stub_job
from naming import nfs_locks
from wan_pack.distributed.group import leftovers
from wan_pack.distributed.group.group_folder import GroupDir
from wan_pack.distributed.group.leftovers import GRACE_SECONDS, KEPT, claim, keep_failed, remove_abandoned
from wan_pack.distributed.hosts.hostfile import HostsDir
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.machine.bell import Bell
from wan_pack.distributed.machine.gpu_locks import try_lock


def fail(folder: Path) -> Path:
    """One more job that failed; its place among the kept ones."""
    job = JobDir.create(folder / "jobs")
    claim(job)
    (job.path / "log").write_text("why")
    return keep_failed(job, folder / "failed")


def test_the_newest_failed_jobs_stay(tmp_path: Path):
    """Of some that came one after the other; and what is no job's is left alone."""
    (tmp_path / "failed" / "mine").mkdir(parents=True)
    kept = []
    for age in range(KEPT + 3, 0, -1):
        kept.append(fail(tmp_path))
        os.utime(kept[-1], (time.time() - 60 * age,) * 2)
    # Its move took the oldest one of those with it, so there is one more than is kept.
    kept.append(fail(tmp_path))
    assert KEPT == 5
    assert [path.exists() for path in kept] == [False] * 4 + [True] * 5
    assert (tmp_path / "failed" / "mine").exists()
    assert (kept[-1] / "log").read_text() == "why"


def test_a_kept_job_has_nothing_that_cannot_move_to_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = JobDir.create(tmp_path / "jobs")
    claim(job)
    (job.path / "log").write_text("why")
    for bell in (job.done_bell, job.bell(0), job.bell(1)):
        Bell(bell).close()

    def across(source: str, target: str) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "rename", across)
    kept = keep_failed(job, tmp_path / "failed")
    assert kept.parent == tmp_path / "failed" and not job.path.exists()
    assert sorted(path.name for path in kept.iterdir()) == ["log", "logs", "owner.lock"]


def test_a_kept_job_is_as_old_as_its_failure(tmp_path: Path):
    """Its folder may be older than all of those that are kept, and it must not be the one that goes."""
    for _ in range(KEPT):
        fail(tmp_path)
    job = JobDir.create(tmp_path / "jobs")
    claim(job)
    os.utime(job.path, (0, 0))
    assert keep_failed(job, tmp_path / "failed").exists()


def test_frames_are_not_kept(tmp_path: Path):
    """Gigabytes that nobody asks for again; nor is what a killed rank had written of them."""
    job = JobDir.create(tmp_path / "jobs")
    claim(job)
    for name in (job.frames.name, f".{job.frames.name}.17.part", "video.mp4"):
        (job.path / name).write_bytes(b"x")
    kept = keep_failed(job, tmp_path / "failed")
    assert sorted(path.name for path in kept.iterdir() if path.is_file()) == ["owner.lock", "video.mp4"]


def test_a_kept_job_is_nobodys(tmp_path: Path):
    """Its lock is let go: the process goes on, with one open file less."""
    job = JobDir.create(tmp_path / "jobs")
    claim(job)
    keep_failed(job, tmp_path / "failed")
    assert job.lock is not None and job.lock.closed


def test_a_name_says_when_a_job_failed(tmp_path: Path):
    before = time.strftime("%Y%m%d-%H%M%S")
    stamp, _, name = fail(tmp_path).name.partition("-wan-job-")
    assert before <= stamp <= time.strftime("%Y%m%d-%H%M%S")
    assert name


def test_a_failed_job_that_cannot_be_moved_keeps_its_files(tmp_path: Path):
    """By a name that the next start leaves alone."""
    (tmp_path / "failed").touch()
    kept = fail(tmp_path)
    assert kept.parent == tmp_path / "jobs" and kept.name.startswith("kept-wan-job-")
    os.utime(kept, (0, 0))
    remove_abandoned(tmp_path / "jobs")
    assert (kept / "log").read_text() == "why"


def test_abandoned_jobs_and_groups_go_when_they_are_old_enough(tmp_path: Path):
    """A folder without an owner may just be being made; one with an owner is in use, however old it is."""
    old, owned = [JobDir.create(tmp_path), GroupDir.create(tmp_path, 1)], JobDir.create(tmp_path)
    young = JobDir.create(tmp_path)
    claim(owned)
    for folder in (*old, owned):
        os.utime(folder.path, (time.time() - GRACE_SECONDS - 5,) * 2)
    os.utime(young.path, (time.time() - GRACE_SECONDS + 20,) * 2)
    (tmp_path / "wan-other").mkdir()
    os.utime(tmp_path / "wan-other", (0, 0))
    remove_abandoned(tmp_path)
    assert [folder.path.exists() for folder in (*old, owned, young)] == [False, False, True, True]
    assert (tmp_path / "wan-other").exists()
    for folder in (owned, young):
        folder.remove()


@pytest.mark.parametrize("before", range(3))
def test_a_folder_is_never_seen_without_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int):
    """Jobs of a batch start at once: while one claims its folder another looks for abandoned ones, at any moment."""
    folder, moments = JobDir.create(tmp_path), 0

    def look(function: Callable[..., Any]) -> Callable[..., Any]:
        def looked(*args: Any, **named: Any) -> Any:
            nonlocal moments
            moments += 1
            if moments == before + 1:
                monkeypatch.undo()
                remove_abandoned(tmp_path)
            return function(*args, **named)

        return looked

    for place, name in ((os, "fdopen"), (leftovers, "try_lock"), (Path, "rename")):
        monkeypatch.setattr(place, name, look(getattr(place, name)))
    claim(folder)
    assert moments == before + 1, "it was looked for"
    remove_abandoned(tmp_path)
    assert folder.owner.exists()
    with folder.owner.open("rb") as file:
        assert not try_lock(file)
    folder.remove()


@pytest.mark.parametrize("kind", ["job", "group", "hosts"])
def test_a_folder_that_is_written_into_meanwhile_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    """By a rank that stays or an agent that ends: the folder is not empty when all that was listed is gone."""
    if kind == "hosts":
        folder = HostsDir.create_for(tmp_path, stub_job(hosts=("a",)), {})
    else:
        folder = JobDir.create(tmp_path) if kind == "job" else GroupDir.create(tmp_path, 1)
    real, late = shutil.rmtree, ["first", "second"]

    def remove(path: Path, **options: Any) -> None:
        real(path, **options)
        if late:
            path.mkdir()
            (path / late.pop()).touch()

    monkeypatch.setattr(shutil, "rmtree", remove)
    folder.remove()
    assert not late and not folder.path.exists()
    folder.remove()


def test_abandoned_jobs_go_on_nfs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """There a file that is open for reading alone cannot be locked by one alone: the answer is no other's lock."""
    nfs_locks(monkeypatch.setattr)
    ours, left = JobDir.create(tmp_path), JobDir.create(tmp_path)
    claim(ours)
    claim(left)
    assert left.lock is not None
    left.lock.close()
    remove_abandoned(tmp_path)
    assert [folder.path.exists() for folder in (ours, left)] == [True, False]
    ours.remove()
