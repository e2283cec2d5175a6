"""Files between processes: what is read of a whole one, and that a damaged one is an error by its name."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from wan_pack.distributed.job import job_folder
from wan_pack.distributed.job.errors import JobError
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.job.json_files import MAX_JSON_BYTES, read_bounded, read_json, replace_text, write_json
from wan_pack.distributed.job.progress import Progress, place, read_progress, steady_seconds


def test_what_is_written_is_read(tmp_path: Path):
    value = {"text": "狐狸 \u00e9 \U0001f98a", "n": [1, 2.5, None, True], "deep": {"a": {"b": []}}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    # People read them, too.
    text = (tmp_path / "x.json").read_text()
    assert "狐狸" in text and len(text.splitlines()) > len(value)
    assert os.listdir(tmp_path) == ["x.json"] and (tmp_path / "x.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[1]", b'"x"', b"null", b"\xff", b'{"a": NaN}', b'{"a": -Infinity}', b"[" * 100_000, b'{"a": 1} x'],
)
def test_a_damaged_file_is_named(tmp_path: Path, data: bytes):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(JobError, match=r"^x\.json (cannot be read|holds a)"):
        read_json(tmp_path / "x.json")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(JobError, match=r"^x\.json cannot be read"):
        read_json(tmp_path / "x.json")


def test_a_bound_is_allowed_and_one_byte_more_is_not(tmp_path: Path):
    path = tmp_path / "x"
    path.write_bytes(b"y" * 10)
    assert read_bounded(path, 10) == "y" * 10
    with pytest.raises(ValueError, match="over 9 bytes"):
        read_bounded(path, 9)
    (tmp_path / "x.json").write_bytes(json.dumps({"x": "y" * MAX_JSON_BYTES}).encode())
    with pytest.raises(JobError, match="over"):
        read_json(tmp_path / "x.json")


def test_a_text_that_cannot_be_written_leaves_the_old_one_and_no_draft(tmp_path: Path):
    replace_text(tmp_path / "x", "old")
    with pytest.raises(UnicodeEncodeError):
        replace_text(tmp_path / "x", "\ud800")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        replace_text(tmp_path / "folder", "new")
    assert (tmp_path / "x").read_text() == "old" and sorted(os.listdir(tmp_path)) == ["folder", "x"]


def test_two_threads_may_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As those of a batch, which have all found the packages good."""
    replace, between = os.replace, threading.Thread(target=write_json, args=(tmp_path / "x.json", {"by": "another"}))

    def another_meanwhile(draft: Path, path: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        between.start()
        between.join()
        replace(draft, path)

    monkeypatch.setattr(os, "replace", another_meanwhile)
    write_json(tmp_path / "x.json", {"by": "this"})
    assert read_json(tmp_path / "x.json") == {"by": "this"} and os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("tries", [1, 3, 20])
def test_a_folder_that_is_written_into_meanwhile_is_removed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tries: int
):
    """By a rank that stays; one that nobody can remove is left after a second."""
    folder = JobDir.create(tmp_path / "jobs")
    folder.lock = folder.owner.open("wb")
    removed: list[Path] = []
    waited: list[float] = []

    def remove(path: Path, *, ignore_errors: bool) -> None:
        assert ignore_errors
        removed.append(path)
        if len(removed) == tries < 20:
            path.rename(tmp_path / "gone")

    monkeypatch.setattr(job_folder.shutil, "rmtree", remove)
    monkeypatch.setattr(job_folder.time, "sleep", waited.append)
    folder.remove()
    assert removed == [folder.path] * tries and waited == [0.05] * (tries if tries == 20 else tries - 1)
    assert folder.lock.closed
    monkeypatch.undo()
    folder.remove()


def test_names_in_a_folder(tmp_path: Path):
    folder = JobDir.create(tmp_path / "new" / "jobs")
    assert folder.path.name.startswith("wan-job-") and folder.logs.stat().st_mode & 0o777 == 0o700
    paths = [folder.bell(2), folder.alive(2), folder.error(2), folder.log(2), folder.video(".mp4")]
    assert [path.relative_to(folder.path).as_posix() for path in paths] == [
        "bell-2", "rank2.alive", "rank2.error.json", "logs/rank2.log", "video.mp4"
    ]  # fmt: skip
    names = {"job": "job.json", "inputs": "inputs.safetensors", "evaluations": "evaluations.json",
             "pictures": "pictures.json", "progress": "progress.json", "preview": "preview.jpg", "stop": "stop.json",
             "result": "result.json", "latents": "latents.safetensors", "frames": "frames.int16", "logs": "logs",
             "done_bell": "done-bell", "owner": "owner.lock", "failures": "failures.json"}  # fmt: skip
    assert {name: getattr(folder, name).relative_to(folder.path).as_posix() for name in names} == names
    other = JobDir.create(tmp_path / "new" / "jobs")
    assert other.path != folder.path
    for one in (folder, other):
        one.remove()


GOOD = {"phase": "denoise", "step": 3, "total": 20, "seconds_per_step": 1.5, "message": "expert"}


def test_progress_is_read_as_it_was_written(tmp_path: Path):
    folder = JobDir(tmp_path)
    folder.write_json(folder.progress, GOOD)
    assert read_progress(folder) == Progress(**GOOD)
    folder.write_json(folder.progress, {"phase": "load", "step": 0, "total": 0})
    assert read_progress(folder) == Progress(phase="load")


@pytest.mark.parametrize(
    "changes",
    [{"phase": None}, {"step": "x"}, {"step": None}, {"total": [1]}, {"seconds_per_step": "fast"}],
)
def test_progress_that_makes_no_sense_is_none_yet(tmp_path: Path, changes: dict[str, object]):
    folder = JobDir(tmp_path)
    assert read_progress(folder) is None
    value = {**GOOD, **changes}
    if changes == {"phase": None}:
        del value["phase"]
    folder.write_json(folder.progress, value)
    assert read_progress(folder) is None
    folder.progress.write_text("{")
    assert read_progress(folder) is None


def test_where_a_rank_is_and_how_fast():
    assert (place("load", 0), place("denoise", 3)) == ("load", "denoise at step 3")
    assert steady_seconds([9.0, 1.0, 3.0]) == 2.0 and steady_seconds([9.0]) == 9.0
