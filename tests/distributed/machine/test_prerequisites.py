"""What is looked at before a job starts, and how it is told; no program is run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio_ffmpeg
import pytest
from jobs import stub_job
from wan_pack.distributed.job.errors import JobError
from wan_pack.distributed.machine import prerequisites
from wan_pack.distributed.machine.prerequisites import FFMPEG_TIMEOUT, check_space, ffmpeg_problem, writing_problem


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        (SimpleNamespace(returncode=0, stderr=b"a warning"), ""),
        (
            SimpleNamespace(returncode=1, stderr=b" no libx264\n"),
            "ffmpeg cannot encode with libx264: no libx264; run pip",
        ),
        (SimpleNamespace(returncode=7, stderr=b""), "ffmpeg cannot encode with libx264: exit code 7; run pip"),
        (OSError("not there"), "ffmpeg is missing: not there; run pip install imageio-ffmpeg"),
        (RuntimeError("none found"), "ffmpeg is missing: none found; run pip install imageio-ffmpeg"),
        (
            subprocess.TimeoutExpired("ffmpeg", 1),
            f"ffmpeg did not write one frame within {FFMPEG_TIMEOUT:g} s; run pip install imageio-ffmpeg",
        ),
    ],
)
def test_ffmpeg_is_asked_for_one_frame(monkeypatch: pytest.MonkeyPatch, ends: Any, words: str):
    asked: list[list[str]] = []

    def ask(command: list[str], *, given: bytes, timeout: float) -> Any:
        assert len(given) == 64 * 64 * 3 and timeout == FFMPEG_TIMEOUT
        asked.append(command)
        if isinstance(ends, Exception):
            raise ends
        return ends

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: "ffmpeg")
    monkeypatch.setattr(prerequisites, "ask_program", ask)
    said = ffmpeg_problem()
    assert said.startswith(words) and bool(said) == bool(words)
    ((_, *options),) = asked
    for pair in ("-f rawvideo", "-pix_fmt rgb24", "-s 64x64", "-i -", "-c:v libx264", "-f null"):
        assert pair in " ".join(options)


def test_a_disk_without_room_is_told_with_both_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = stub_job(width=1280, height=720, num_frames=81).made_bytes()
    needed = prerequisites.MIN_FREE_BYTES + int(1280 * 720 * 81 * (0.25 + 0.9))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed))
    check_space({tmp_path: made})
    for free in (needed - 1, 5 << 20):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        with pytest.raises(JobError) as caught:
            check_space({tmp_path: made})
    said = f"{tmp_path} has 5 MiB free; the job needs {needed / 2**20:.0f} MiB. Free some space there"
    assert str(caught.value) == said


def test_folders_of_one_disk_share_its_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disks = {tmp_path / "jobs": 1, tmp_path / "output": 1, tmp_path / "other": 2}
    known = Path.stat

    def stat(path: Path, **options: bool) -> Any:
        return SimpleNamespace(st_dev=disks[path]) if path in disks else known(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100 << 20))
    jobs, output, other = disks
    check_space({jobs: 30 << 20, other: 30 << 20})
    with pytest.raises(JobError, match=f"^{other} has 100 MiB free; the job needs 101 MiB"):
        check_space({jobs: 30 << 20, other: 37 << 20})
    with pytest.raises(JobError, match=f"^{jobs} and {output} are on one disk, which has 100 MiB free; .* 124 MiB"):
        check_space({jobs: 30 << 20, output: 30 << 20})


def test_a_folder_is_made_and_left_empty(tmp_path: Path):
    assert writing_problem(tmp_path / "a" / "b") == ""
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    assert writing_problem(tmp_path / "file").startswith(f"{tmp_path / 'file'} cannot be written to: ")
