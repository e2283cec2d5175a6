"""Machines that lack something: one sentence each, before any process starts."""

from __future__ import annotations

import errno
import importlib.metadata
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from mount import SUPPORT
from patience import COMES_UP
from wan_pack.distributed.group import installation
from wan_pack.distributed.job.errors import JobError
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.launch import launcher
from wan_pack.distributed.machine import prerequisites
from wan_pack.distributed.machine.prerequisites import check_prerequisites, torch_problem, writing_problem
from wan_pack.nodes.host import host
from wan_pack.nodes.inference import saved_video
from wan_pack.wan.video.video_formats import FORMATS, H264

PARALLEL = Parallel(gpu_count=1)


@pytest.mark.processes
def test_this_machine_has_all():
    check_prerequisites(PARALLEL, file_format=FORMATS[H264])


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_other_systems(monkeypatch: pytest.MonkeyPatch, platform: str):
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(JobError, match=rf"^this system is {platform}; videos are made on Linux \(or WSL2\) only"):
        check_prerequisites(PARALLEL, file_format=None)


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("2.5.1+cu124", "torch is 2.5.1+cu124; it must be 2.7 or newer"),
        ("1.13.1", "torch is 1.13.1; it must be 2.7 or newer"),
        ("2.6.0", "torch is 2.6.0; it must be 2.7 or newer"),
        ("2.7.0", ""),
        ("2.10.0a0+git123", ""),
        ("3.0", ""),
    ],
)
def test_torch_versions(monkeypatch: pytest.MonkeyPatch, version: str, problem: str):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert torch_problem() == problem


def ffmpeg(monkeypatch: pytest.MonkeyPatch, get_ffmpeg_exe: Any) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", types.SimpleNamespace(get_ffmpeg_exe=get_ffmpeg_exe))


def test_no_ffmpeg(monkeypatch: pytest.MonkeyPatch):
    def missing() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    ffmpeg(monkeypatch, missing)
    with pytest.raises(
        JobError, match=r"^ffmpeg is missing: No ffmpeg exe .* set IMAGEIO_FFMPEG_EXE .* decode_video off"
    ):
        check_prerequisites(PARALLEL, file_format=FORMATS[H264])
    check_prerequisites(PARALLEL, file_format=None)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            "echo \"Unknown encoder 'libx264'\" >&2; exit 1",
            "ffmpeg cannot encode with libx264: Unknown encoder 'libx264'",
        ),
        ("exit 3", "ffmpeg cannot encode with libx264: exit code 3"),
        ("exec sleep 600", "ffmpeg did not write one frame within 0.3 s"),
    ],
)
def test_an_ffmpeg_that_does_not_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, words: str):
    program = tmp_path / "ffmpeg"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    ffmpeg(monkeypatch, lambda: str(program))
    monkeypatch.setattr(prerequisites, "FFMPEG_TIMEOUT", 0.3 if "sleep" in script else COMES_UP)
    assert prerequisites.ffmpeg_problem().startswith(words)


@pytest.mark.processes
def test_an_ffmpeg_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    ffmpeg(monkeypatch, lambda: str(tmp_path / "gone"))
    assert prerequisites.ffmpeg_problem().startswith("ffmpeg is missing: ")


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file can be made anywhere, as on a file system that is mounted read-only; root may write all others."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(prerequisites.tempfile, "TemporaryFile", refuse)


def test_writing_leaves_nothing(tmp_path: Path):
    assert writing_problem(tmp_path) == ""
    assert list(tmp_path.iterdir()) == []
    assert writing_problem(tmp_path / "new") == "" and (tmp_path / "new").is_dir()
    (tmp_path / "file").touch()
    assert "inner cannot be written to: Not a directory" in writing_problem(tmp_path / "file" / "inner")


def test_a_read_only_output_folder_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(host, "save_path", lambda *_: (tmp_path, "wan", 1, ""))
    saved_video.check_prefix("wan", 16, 16, ".mp4")
    read_only(monkeypatch)
    with pytest.raises(ValueError, match="cannot be written to: Read-only file system; correct its permissions"):
        saved_video.check_prefix("wan", 16, 16, ".mp4")


def test_a_number_that_another_comfyui_took_meanwhile_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def copy(source: Path, target: Path, workflow: Any) -> None:
        target.write_text("ours")
        (tmp_path / "wan_00001_.mp4").write_text("theirs")

    monkeypatch.setattr(host, "save_path", lambda *_: (tmp_path, "wan", 1, ""))
    monkeypatch.setattr(host, "copy_video", copy)
    saved = saved_video.save_video(tmp_path / "video.mp4", "wan", width=16, height=16, workflow={})
    assert (saved.path.name, saved.path.read_text()) == ("wan_00002_.mp4", "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wan_00001_.mp4", "wan_00002_.mp4"]


def test_an_output_folder_that_cannot_be_made_is_no_matter_of_the_prefix(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    fake = types.SimpleNamespace(get_save_image_path=refuse, get_output_directory=lambda: "/output")
    monkeypatch.setitem(sys.modules, "folder_paths", fake)
    with pytest.raises(ValueError, match=r"filename_prefix is 'a/b'; its folder cannot be made: .*denied"):
        saved_video.check_prefix("a/b", 16, 16, ".mp4")


def test_a_job_starts_nothing_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    job = types.SimpleNamespace(encodes=False, looks=False, file_format=None, made_bytes=lambda: 0, parallel=PARALLEL)

    def run() -> None:
        launcher.run_job(job, lambda path: None, parent=tmp_path / "jobs", failed=tmp_path / "failed")  # type: ignore[arg-type]

    def missing(modules: Any, source: Any) -> dict[str, dict[str, str]]:
        return {"diffusers": {"missing": "diffusers"}}

    with monkeypatch.context() as patch:
        patch.setattr(launcher, "check_installation", lambda **_: None)
        read_only(patch)
        with pytest.raises(JobError, match="jobs cannot be written to: Read-only file system"):
            run()
    monkeypatch.setattr(installation, "_ask", missing)
    monkeypatch.setattr(installation, "_good", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(JobError, match=r"not installed .* diffusers"):
        run()
    assert not list((tmp_path / "jobs").iterdir())


WINDOWS = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import asyncio, concurrent.futures, multiprocessing, shutil, subprocess, tempfile
import numpy, PIL.Image, safetensors.torch, torch
# What Windows lacks is taken away only now that the libraries, which have their own ways there, are in.
sys.platform = "win32"
for name in ("SIGKILL", "SIGSTOP", "SIGUSR1", "SIGHUP", "SIGCHLD", "SIGALRM"):
    delattr(signal, name)
for name in ("pidfd_open", "sysconf", "mkfifo", "getuid", "fchmod"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
from mount import mount_pack
mount_pack()
import wan_pack.nodes
print(*wan_pack.nodes.NODE_CLASS_MAPPINGS)
"""


@pytest.mark.processes
def test_the_nodes_load_on_windows():
    script = WINDOWS.format(tests=str(SUPPORT))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "WanVideoDistributedInference" in ended.stdout.split(), ended.stderr
