"""ComfyUI killed while a finished video gets its name: at each call that it makes there."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from jobs import stub_job
from wan_pack.distributed.group.leftovers import claim, remove_abandoned
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.launch.launcher import Result
from wan_pack.distributed.machine.gpu_locks import try_lock
from wan_pack.nodes.host import host
from wan_pack.nodes.inference import draft, outcome

VIDEO = b"a whole video" * 1000
SYSTEM = ("posix", "_io", "fcntl")
"""Modules whose built-in functions are system calls."""
VIDEOS = 2
"""One after another, as a batch saves them."""


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's output folder."""
    folder = tmp_path / "output"
    folder.mkdir()

    def save_path(prefix: str, width: int, height: int) -> tuple[Path, str, int, str]:
        return folder, prefix, 1 + len(list(folder.glob(f"{prefix}_*"))), ""

    monkeypatch.setattr(host, "save_path", save_path)
    monkeypatch.setattr(host, "copy_video", lambda source, target, workflow: shutil.copyfile(source, target))
    monkeypatch.setattr(host, "failed_folder", lambda: tmp_path / "failed")
    monkeypatch.setattr(outcome, "_read_latents", lambda path: None)
    return folder


def no_unnamed_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS."""
    opened = os.open

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return opened(path, flags, *rest, **named)

    monkeypatch.setattr(draft.os, "open", refuse)


def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on exFAT and many network shares."""
    no_unnamed_files(monkeypatch)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(draft.os, "link", refuse)


KINDS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "ordinary": lambda monkeypatch: None,
    "no unnamed files": no_unnamed_files,
    "no links": no_links,
}


def save_videos(jobs: Path) -> None:
    """What the nodes do when a job is done."""
    for _ in range(VIDEOS):
        folder = JobDir.create(jobs)
        claim(folder)
        folder.video(".mp4").write_bytes(VIDEO)
        outcome.keep(stub_job(), Result(folder, {"video": {"width": 64, "height": 48}}, "", 1.0), "wan", {})


class KillAt:
    """A profiler that kills its process before a system call."""

    def __init__(self, number: int) -> None:
        self._left = number

    def __call__(self, frame: FrameType, event: str, what: Any) -> None:
        self._left -= event == "c_call" and what.__module__ in SYSTEM
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def kills(jobs: Path) -> Iterator[bool]:
    """Saves in a process that is killed before the first system call, then before the second, and so on. False at last,
    when it was not killed."""
    killed, number = True, 0
    while killed:
        number += 1
        child = os.fork()
        if child == 0:
            sys.setprofile(KillAt(number))
            save_videos(jobs)
            sys.setprofile(None)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        killed = status != 0
        yield killed


@pytest.mark.processes
@pytest.mark.parametrize("kind", KINDS)
def test_fault_34_a_video_has_its_name_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, output: Path, tmp_path: Path, kind: str
):
    KINDS[kind](monkeypatch)
    jobs, hidden, counts = tmp_path / "jobs", 0, set()
    jobs.mkdir()
    for killed in kills(jobs):
        names = sorted(path.name for path in output.iterdir())
        videos = [name for name in names if not name.startswith(".")]
        assert videos == [f"wan_{number:05}_.mp4" for number in range(1, len(videos) + 1)]
        assert all((output / name).read_bytes() == VIDEO for name in videos)
        counts.add(len(videos))
        hidden += len(names) - len(videos)
        if kind == "ordinary":
            assert names == videos
        # What is left is gone when the next one is saved and the next job starts.
        for path in jobs.iterdir():
            os.utime(path, (0, 0))
        remove_abandoned(jobs)
        assert list(jobs.iterdir()) == []
        if killed:
            save_videos(jobs)
        paths = list(output.iterdir())
        assert len(paths) == len(videos) + VIDEOS * killed
        assert all(path.read_bytes() == VIDEO for path in paths)
        for path in paths:
            path.unlink()
    # It was killed before, between and after.
    assert counts == {0, 1, 2}
    assert bool(hidden) == (kind != "ordinary")


@pytest.mark.parametrize("late", [False, True], ids=["before its lock", "while it is locked"])
def test_fault_34_a_draft_that_is_just_being_made_is_nobody_elses_to_remove(
    monkeypatch: pytest.MonkeyPatch, output: Path, tmp_path: Path, late: bool
):
    """Two videos are saved at once: each removes the drafts that nobody has locked."""
    no_unnamed_files(monkeypatch)
    taken = 0

    def lock(file: Any, *, wait: bool = False) -> bool:
        nonlocal taken
        taken += wait
        if not wait or taken > 1:
            return try_lock(file, wait=wait)
        if late:
            with next(output.glob(".*")).open("rb") as other:
                assert try_lock(other) and not try_lock(file)
                next(output.glob(".*")).unlink()
        else:
            draft._remove_abandoned(output)
        return try_lock(file, wait=wait)

    monkeypatch.setattr(draft, "try_lock", lock)
    save_videos(tmp_path / "jobs")
    assert taken == VIDEOS + 1, "one more, for that which was removed"
    assert [path.read_bytes() for path in output.iterdir()] == [VIDEO] * VIDEOS


@pytest.mark.parametrize("kind", KINDS)
def test_fault_34_a_taken_name_is_left_alone(monkeypatch: pytest.MonkeyPatch, output: Path, tmp_path: Path, kind: str):
    KINDS[kind](monkeypatch)

    def copy(source: Path, target: Path, workflow: Any) -> None:
        shutil.copyfile(source, target)
        # By another ComfyUI, meanwhile.
        (output / "wan_00001_.mp4").write_text("theirs")

    monkeypatch.setattr(host, "copy_video", copy)
    save_videos(tmp_path / "jobs")
    found = {path.name: path.read_bytes() for path in output.iterdir()}
    assert found == {"wan_00001_.mp4": b"theirs", "wan_00002_.mp4": VIDEO, "wan_00003_.mp4": VIDEO}
    assert (output / "wan_00002_.mp4").stat().st_mode & 0o777 == 0o666 & ~_umask()


@pytest.mark.parametrize("kind", KINDS)
def test_fault_34_a_video_that_cannot_be_copied_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, output: Path, tmp_path: Path, kind: str
):
    KINDS[kind](monkeypatch)

    def full(source: Path, target: Path, workflow: Any) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(host, "copy_video", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(outcome.JobError, match="No space left on device; it is kept in"):
        save_videos(tmp_path / "jobs")
    assert list(output.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before
    (kept,) = (tmp_path / "failed").iterdir()
    assert sorted(path.name for path in kept.iterdir()) == ["logs", "owner.lock", "video.mp4"]


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
