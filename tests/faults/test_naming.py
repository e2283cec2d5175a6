"""ComfyUI killed while a finished video gets its name: at each call that it makes there."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from naming import KINDS, VIDEO, VIDEOS, kills, nfs_locks, no_unnamed_files, save_videos, small_comfyui
from wan_pack.distributed.group.leftovers import remove_abandoned
from wan_pack.distributed.machine.gpu_locks import try_lock
from wan_pack.nodes.host import host
from wan_pack.nodes.inference import draft, outcome


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's output folder."""
    return small_comfyui(monkeypatch.setattr, tmp_path)


@pytest.mark.processes
@pytest.mark.parametrize("kind", KINDS)
def test_fault_34_a_video_has_its_name_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, output: Path, tmp_path: Path, kind: str
):
    KINDS[kind](monkeypatch.setattr)
    jobs, hidden, counts = tmp_path / "jobs", 0, set()
    jobs.mkdir()
    for killed in kills(kind, tmp_path):
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


def test_fault_34_a_draft_that_a_kill_left_on_nfs_is_removed(
    monkeypatch: pytest.MonkeyPatch, output: Path, tmp_path: Path
):
    """And one that somebody still writes stays."""
    no_unnamed_files(monkeypatch.setattr)
    nfs_locks(monkeypatch.setattr)
    for name in ("left", "written"):
        (output / f"{draft.PREFIX}{name}.mp4").touch()
    with (output / f"{draft.PREFIX}written.mp4").open("r+b") as written:
        assert try_lock(written)
        save_videos(tmp_path / "jobs")
    assert [path.name for path in output.glob(".*")] == [f"{draft.PREFIX}written.mp4"]


@pytest.mark.parametrize("late", [False, True], ids=["before its lock", "while it is locked"])
def test_fault_34_a_draft_that_is_just_being_made_is_nobody_elses_to_remove(
    monkeypatch: pytest.MonkeyPatch, output: Path, tmp_path: Path, late: bool
):
    """Two videos are saved at once: each removes the drafts that nobody has locked."""
    no_unnamed_files(monkeypatch.setattr)
    taken = 0

    def lock(file: Any, *, wait: bool = False) -> bool:
        nonlocal taken
        taken += wait
        if not wait or taken > 1:
            return try_lock(file, wait=wait)
        if late:
            with next(output.glob(".*")).open("r+b") as other:
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
    KINDS[kind](monkeypatch.setattr)

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
    KINDS[kind](monkeypatch.setattr)

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
