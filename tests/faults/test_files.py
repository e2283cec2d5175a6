"""What a job leaves on disk and in memory, and what it believes of what it finds there."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import run_stub
from kept_memory import give_back_freed_memory
from mount import SUPPORT
from patience import AT_ONCE, COMES_UP
from wan_pack.distributed.group.leftovers import claim, keep_failed, remove_abandoned
from wan_pack.distributed.group.logs import clean_lines
from wan_pack.distributed.job.errors import JobCancelled
from wan_pack.distributed.job.job import JobError
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.job.json_files import read_json
from wan_pack.distributed.launch import launcher
from wan_pack.distributed.launch.launcher import JobFailed, Result
from wan_pack.distributed.machine import prerequisites

RunFake = Callable[..., Result]


@pytest.mark.processes
def test_fault_13_leftovers_are_never_read_and_go_when_the_next_job_starts(run_fake: RunFake, tmp_path: Path):
    stale = JobDir.create(tmp_path / "jobs")
    claim(stale)
    assert stale.lock is not None
    stale.lock.close()  # As the kernel does when its holder dies.
    stale.write_json(stale.result, {"id": "0f", "version": 2, "latents": {"shape": [1]}})
    result = run_fake("good")
    assert result.info["id"] == json.loads(result.folder.job.read_text())["id"]
    assert not stale.path.exists()
    result.remove()


def test_fault_13_only_folders_of_the_dead_are_removed(tmp_path: Path):
    abandoned, live, young = (JobDir.create(tmp_path) for _ in range(3))
    claim(live)
    claim(abandoned)
    assert abandoned.lock is not None
    abandoned.lock.close()
    remove_abandoned(tmp_path)
    assert not abandoned.path.exists()
    assert live.path.exists()
    assert young.path.exists()
    os.utime(young.path, (0, 0))
    remove_abandoned(tmp_path)
    assert not young.path.exists()
    live.remove()


def test_fault_13_a_failed_job_that_cannot_be_moved_is_kept_where_it_is(tmp_path: Path):
    failed = JobDir.create(tmp_path / "jobs")
    claim(failed)
    (tmp_path / "failed").touch()
    kept = keep_failed(failed, tmp_path / "failed")
    remove_abandoned(tmp_path / "jobs")
    assert kept.is_dir()


def test_fault_15_readers_never_see_half_a_file(tmp_path: Path):
    folder = JobDir.create(tmp_path)
    folder.write_json(folder.progress, {"step": 0, "text": "x" * 5000})
    enough = threading.Event()

    def write() -> None:
        for step in itertools.count(1):
            folder.write_json(folder.progress, {"step": step, "text": "x" * 5000})
            if enough.is_set():
                return

    writer = threading.Thread(target=write)
    writer.start()
    steps, deadline = set(), time.monotonic() + COMES_UP
    try:
        # Whoever gets more of the processor: while the other one writes.
        while len(steps) < 100 and time.monotonic() < deadline:
            read = folder.read_json(folder.progress)
            assert len(read["text"]) == 5000
            steps.add(read["step"])
    finally:
        enough.set()
        writer.join()
    assert len(steps) == 100
    assert [path.name for path in folder.path.iterdir() if path.is_file()] == ["progress.json"]
    folder.remove()


WRITER = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from mount import mount_pack
mount_pack()
from pathlib import Path
from wan_pack.distributed.job.json_files import write_json
path = Path(sys.argv[2])
write_json(path, {"is": "old"})
replace = os.replace
def pause(*paths):
    print("writing", flush=True)
    time.sleep(600)
    replace(*paths)
os.replace = pause
write_json(path, {"is": "new"})
"""


@pytest.mark.processes
def test_fault_15_a_writer_killed_in_the_middle_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "result.json"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(SUPPORT), str(path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    with writer.stdout:
        assert writer.stdout.readline() == "writing\n"
        writer.kill()
    writer.wait(AT_ONCE)
    assert read_json(path) == {"is": "old"}


@pytest.mark.processes
def test_fault_16_a_disk_that_fills_up_is_named(fails: Callable[..., JobFailed]):
    error = fails("full disk")
    assert str(error).startswith("rank 1: SafetensorError: ")
    assert "File too large" in str(error)
    assert "Free space on the disk" in str(error)


@pytest.mark.processes
def test_fault_16_a_full_disk_is_named_before_the_start(
    run_fake: RunFake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    usage = prerequisites.shutil.disk_usage("/")
    monkeypatch.setattr(prerequisites.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(JobError, match=r"has 1 MiB free; the job needs \d+ MiB") as caught:
        run_fake("good")
    assert str(tmp_path / "jobs") in str(caught.value)
    assert not list((tmp_path / "jobs").iterdir())


@pytest.mark.processes
@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("nothing", r"result\.json cannot be read"),
        ("other id", "is of job '00'"),
        ("wrong shape", "not what result"),
        ("half a tensor", r"latents\.safetensors"),
        ("no video", r"video\.mp4 is missing"),
        ("fail", "the agent ended with exit code 1"),
        ("good, then fail", "the agent ended with exit code 1"),
        ("die", "the agent was killed by SIGKILL"),
    ],
)
def test_fault_17_only_a_whole_result_is_success(run_fake: RunFake, tmp_path: Path, mode: str, words: str):
    with pytest.raises(JobFailed, match=words) as caught:
        run_fake(mode)
    assert caught.value.folder is not None
    assert caught.value.folder.parent == tmp_path / "failed"
    assert str(caught.value.folder) in str(caught.value)
    assert not list((tmp_path / "jobs").iterdir())


@pytest.mark.processes
def test_fault_18_a_flood_of_log_is_bounded(run_fake: RunFake):
    """About 200 MB, binary, with redrawn progress bars and no newline at the end."""
    lines: list[str] = []
    before = resident_bytes()
    result = run_fake("flood", callbacks={"on_log_line": lines.append})
    assert resident_bytes() - before < 32 << 20
    assert len(result.log) <= launcher.MAX_LOG
    assert result.log.endswith("the end without a newline")
    assert len(lines) < 50_000
    assert all(len(line) <= launcher.MAX_LOG for line in lines)
    result.remove()


def test_fault_18_redrawn_lines_collapse_and_the_undecodable_is_replaced():
    assert clean_lines(b"10%\r 50%\r100%\nnext\r\n\xff\n\n") == ["100%", "next", "\ufffd"]


def resident_bytes() -> int:
    give_back_freed_memory()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.processes
def test_fault_18_no_line_of_an_ordinary_log_is_lost(stub_pack: Callable[..., None], tmp_path: Path):
    stub_pack("chatter", rank=0)
    lines: list[str] = []
    with pytest.raises(JobCancelled):
        run_stub(tmp_path, on_log_line=lines.append, cancelled=lambda: "line 399" in lines)
    assert [line for line in lines if line.startswith("line ")] == [f"line {n}" for n in range(400)]


@pytest.mark.processes
def test_fault_26_files_are_private_whatever_the_umask(fails: Callable[..., JobFailed], tmp_path: Path):
    before = os.umask(0)
    try:
        error = fails("raise")
    finally:
        os.umask(before)
    folder = error.folder
    assert folder is not None
    assert str(folder) in str(error)
    assert folder.stat().st_mode & 0o777 == 0o700
    files = list(folder.rglob("*"))
    # The agent's failures.json is there only where it found the end before ComfyUI did; all JSON is written in one way.
    assert {path.name for path in files} >= {"job.json", "logs", "rank0.log", "rank1.log"}
    assert [path.name for path in files if path.stat().st_mode & 0o077] == []


@pytest.mark.processes
def test_fault_26_a_jobs_folder_goes_with_it(run_fake: RunFake, tmp_path: Path):
    before = os.umask(0)
    try:
        result = run_fake("good")
    finally:
        os.umask(before)
    assert result.folder.video(".mp4").exists()
    assert result.folder.path.stat().st_mode & 0o777 == 0o700
    assert result.folder.inputs.stat().st_mode & 0o777 == 0o600
    result.remove()
    assert not list((tmp_path / "jobs").iterdir())


@pytest.mark.processes
def test_fault_29_failing_jobs_leave_no_descriptors_threads_or_folders(run_fake: RunFake, tmp_path: Path):
    with pytest.raises(JobFailed):
        run_fake("fail")
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(20):
        with pytest.raises(JobFailed):
            run_fake("fail")
    # A thread that was told to end may need a moment.
    deadline = time.monotonic() + AT_ONCE
    while (held := (len(os.listdir("/proc/self/fd")), threading.active_count())) != before:
        assert time.monotonic() < deadline, (held, before)
        time.sleep(0.05)
    assert not list((tmp_path / "jobs").iterdir())
    assert len(list((tmp_path / "failed").iterdir())) == 5, "only the newest five are kept"
    run_fake("good").remove()
