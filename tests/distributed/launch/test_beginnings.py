"""What a job has done by the time that a group is asked for, in the place of which is one that takes none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import stub_job
from wan_pack.distributed.group.leftovers import claim, remove_abandoned
from wan_pack.distributed.job.errors import JobCancelled, JobError
from wan_pack.distributed.job.job import Job
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.launch import launcher
from wan_pack.distributed.launch.launcher import run_job


class NoGroups:
    """In the place of a pool: `look` is shown the job's folder."""

    def __init__(self, look: Callable[[JobDir], None]) -> None:
        self._look = look

    def take(self, job: Job, parent: Path, **_: Any) -> Any:
        (path,) = parent.iterdir()
        self._look(JobDir(path))
        raise JobCancelled("cancelled")


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    monkeypatch.setattr(launcher, "check_prerequisites", lambda *_, **__: None)
    monkeypatch.setattr(launcher, "check_installation", lambda **_: None)

    def run(look: Callable[[JobDir], None], write: Callable[[Path], Any] = Path.touch, **more: Any) -> None:
        pool: Any = NoGroups(look)
        run_job(stub_job(), write, parent=tmp_path / "jobs", failed=tmp_path / "failed", pool=pool, **more)

    return run


def test_its_folder_is_its_own_and_private_and_those_of_the_dead_are_gone(begin: Callable[..., None], tmp_path: Path):
    dead = JobDir.create(tmp_path / "jobs")
    claim(dead)
    assert dead.lock is not None
    dead.lock.close()
    looked: list[JobDir] = []

    def look(folder: JobDir) -> None:
        assert folder.path != dead.path, "the only one"
        assert [path.stat().st_mode & 0o777 for path in (folder.path, folder.inputs, folder.job)] == [
            0o700, 0o600, 0o600
        ]  # fmt: skip
        # However old it is: another ComfyUI that shares the folder leaves it alone.
        os.utime(folder.path, (0, 0))
        remove_abandoned(folder.path.parent)
        assert folder.job.exists() and isinstance(folder.read_job(), Job)
        looked.append(folder)

    before = os.umask(0)
    try:
        with pytest.raises(JobCancelled):
            begin(look)
    finally:
        os.umask(before)
    assert len(looked) == 1 and not list((tmp_path / "jobs").iterdir())


def test_without_room_no_folder_is_made(begin: Callable[..., None], tmp_path: Path):
    with pytest.raises(JobError, match="free"):
        begin(lambda folder: pytest.fail("asked for a group"), room={tmp_path: 1 << 60})
    assert not list((tmp_path / "jobs").glob("wan-job-*"))


def test_a_cancel_before_it_begins_asks_for_nothing(begin: Callable[..., None], tmp_path: Path):
    with pytest.raises(JobCancelled):
        begin(lambda folder: pytest.fail("asked for a group"), cancelled=lambda: True)
    assert not (tmp_path / "jobs").exists()


def test_inputs_that_cannot_be_written_leave_no_folder(begin: Callable[..., None], tmp_path: Path):
    def full(path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        begin(lambda folder: pytest.fail("asked for a group"), full)
    assert not list((tmp_path / "jobs").iterdir())
