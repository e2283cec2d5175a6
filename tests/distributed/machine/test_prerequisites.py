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
from wan_pack.distributed.machine import prerequisites
from wan_pack.distributed.machine.prerequisites import FFMPEG_TIMEOUT, ffmpeg_problem, space_problem, writing_problem


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
    made = stub_job(width=1280, height=720, num_frames=81).made_bytes
    needed = prerequisites.MIN_FREE_BYTES + int(1280 * 720 * 81 * (0.25 + 0.9))
    for free, fits in ((needed, True), (needed - 1, False), (5 << 20, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        assert (space_problem(tmp_path, made) == "") is fits
    assert space_problem(tmp_path, made) == (
        f"{tmp_path} has 5 MiB free; the job needs {needed / 2**20:.0f} MiB. Free some space there"
    )


def test_a_folder_is_made_and_left_empty(tmp_path: Path):
    assert writing_problem(tmp_path / "a" / "b") == ""
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    assert writing_problem(tmp_path / "file").startswith(f"{tmp_path / 'file'} cannot be written to: ")
