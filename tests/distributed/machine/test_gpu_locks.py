"""One lock per GPU, between processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mount import SUPPORT
from patience import AT_ONCE
from wan_pack.distributed.job.errors import JobCancelled, JobError
from wan_pack.distributed.machine import gpu_locks
from wan_pack.distributed.machine.gpu_locks import GpuLocks, wait_for_gpus

HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from mount import mount_pack
mount_pack()
from pathlib import Path
from wan_pack.distributed.machine.gpu_locks import wait_for_gpus
locks = wait_for_gpus(sys.argv[3:], cancelled=lambda: False, on_wait=print, folder=Path(sys.argv[2]))
print("held", flush=True)
time.sleep(600)
"""
Hold = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """Has another process take GPUs, and returns it when it has them."""
    started: list[subprocess.Popen[str]] = []

    def start(*gpus: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(SUPPORT), str(tmp_path), *gpus], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def take(folder: Path, *gpus: str, told: list[str] | None = None, seconds: float = 0.0) -> GpuLocks:
    """Waits at most this long."""
    deadline = time.monotonic() + seconds
    tell = (lambda text: None) if told is None else told.append
    return wait_for_gpus(gpus, cancelled=lambda: time.monotonic() >= deadline, on_wait=tell, folder=folder)


@pytest.mark.processes
def test_other_gpus_are_free(hold: Hold, tmp_path: Path):
    hold("0", "1")
    told: list[str] = []
    take(tmp_path, "2", "3", told=told).release()
    assert told == []


@pytest.mark.processes
def test_one_waits_for_whoever_has_its_gpu_and_says_for_whom(hold: Hold, tmp_path: Path):
    holder = hold("0", "1")
    told: list[str] = []
    started = time.monotonic()
    with pytest.raises(JobCancelled, match="cancelled while waiting for a GPU"):
        take(tmp_path, "1", "2", told=told, seconds=0.5)
    assert 0.5 <= time.monotonic() - started < AT_ONCE
    assert told == [f"waiting for GPU 1, in use by process {holder.pid}"], "once, not at every look"
    # It waits with empty hands: what it did get of its GPUs is free for others.
    take(tmp_path, "2").release()


@pytest.mark.processes
def test_a_holder_that_is_killed_lets_go(hold: Hold, tmp_path: Path):
    holder = hold("GPU-0a1b")
    with pytest.raises(JobCancelled):
        take(tmp_path, "GPU-0a1b")
    holder.kill()
    holder.wait()
    take(tmp_path, "GPU-0a1b", seconds=AT_ONCE).release()


def test_two_jobs_of_one_process_wait_for_each_other(tmp_path: Path):
    first = take(tmp_path, "0")
    told: list[str] = []
    with pytest.raises(JobCancelled):
        take(tmp_path, "0", told=told)
    assert told == [f"waiting for GPU 0, in use by process {os.getpid()}"]
    first.release()
    take(tmp_path, "0").release()


def test_the_order_of_the_ids_does_not_matter(hold: Hold, tmp_path: Path):
    """Else two programs could each hold what the other waits for."""
    opened: list[str] = []
    real = gpu_locks._open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_locks, "_open", lambda path: opened.append(path.name) or real(path))
        take(tmp_path, "1", "0").release()
        take(tmp_path, "0", "1").release()
    assert opened == ["gpu-0.lock", "gpu-1.lock"] * 2


def test_without_a_gpu_nothing_is_locked(tmp_path: Path):
    wait_for_gpus([], cancelled=lambda: True, on_wait=lambda text: None).release()
    take(tmp_path).release()
    assert not list(tmp_path.iterdir())


def test_the_next_holder_may_be_another_user(tmp_path: Path):
    """Whatever this user's umask was when the file was made."""
    before = os.umask(0o077)
    try:
        take(tmp_path, "0").release()
    finally:
        os.umask(before)
    assert (tmp_path / "gpu-0.lock").stat().st_mode & 0o777 == 0o666


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: os.mkfifo(path)], ids=["folder", "fifo"])
def test_what_is_not_a_file_is_refused(make: Callable[[Path], None], tmp_path: Path):
    make(tmp_path / "gpu-0.lock")
    with pytest.raises(JobError, match=r"the GPU's lock .*gpu-0\.lock .*remove it"):
        take(tmp_path, "0")


def test_a_lock_that_names_nobody_is_another_programs(tmp_path: Path):
    """Of a program that was stopped before it wrote its name, or wrote something else."""
    told: list[str] = []
    with gpu_locks._place("3", tmp_path).open("w") as file:
        file.write(" \n")
        file.flush()
        assert gpu_locks.try_lock(file)
        with pytest.raises(JobCancelled):
            take(tmp_path, "3", told=told)
    assert told == ["waiting for GPU 3, in use by another program"]


def test_who_has_a_gpu_is_told_of_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert gpu_locks.holder("0", tmp_path) == ""
    held = take(tmp_path, "0")
    assert gpu_locks.holder("0", tmp_path) == "", "this process has it itself"
    mine = f"process {os.getpid()}"
    monkeypatch.setattr(gpu_locks, "_own_name", lambda: "process 7")
    assert gpu_locks.holder("0", tmp_path) == mine
    held.release()
    assert gpu_locks.holder("0", tmp_path) == ""
    # Elsewhere there are no such locks.
    monkeypatch.setattr(gpu_locks.sys, "platform", "win32")
    monkeypatch.setattr(gpu_locks, "_open", lambda path: pytest.fail("nothing is opened"))
    assert gpu_locks.holder("0", tmp_path) == ""


def test_the_name_of_the_next_holder_takes_the_place_of_a_longer_one(tmp_path: Path):
    (tmp_path / "gpu-0.lock").write_text("process 123456789 and more")
    held = take(tmp_path, "0")
    assert (tmp_path / "gpu-0.lock").read_text() == f"process {os.getpid()}"
    held.release()
    assert (tmp_path / "gpu-0.lock").read_text() == "", "and none stays"


@pytest.mark.parametrize("left", ["", "process 123"], ids=["nobody", "one that was killed"])
def test_several_may_look_at_a_free_gpu_at_once(left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two ComfyUIs that plan at the same moment: neither is the other's program that has the GPU."""
    (tmp_path / "gpu-0.lock").write_text(left)
    said: list[str] = []
    real = gpu_locks.try_lock

    def with_another(file: Any, **how: bool) -> bool:
        locked = real(file, **how)
        monkeypatch.setattr(gpu_locks, "try_lock", real)
        said.append(gpu_locks.holder("0", tmp_path))
        return locked

    monkeypatch.setattr(gpu_locks, "try_lock", with_another)
    said.append(gpu_locks.holder("0", tmp_path))
    assert set(said) == {""}


def test_who_takes_a_gpu_does_not_wait_for_who_looks_at_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    take(tmp_path, "0").release()
    monkeypatch.setattr(gpu_locks, "try_lock", lambda file, **how: pytest.fail("a look is a lock"))
    assert gpu_locks.holder("0", tmp_path) == ""


def test_the_folder_of_locks_is_everybodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whoever made it, and whatever his umask was; it may be there already. A name has only what a file name may."""
    monkeypatch.setattr(gpu_locks, "Path", lambda path: tmp_path / path.lstrip("/").replace("/", "-"))
    before = os.umask(0o077)
    try:
        folders = [gpu_locks._folder() for _ in range(2)]
    finally:
        os.umask(before)
    assert folders == [tmp_path / "tmp-wan-distributed-gpus"] * 2
    assert folders[0].stat().st_mode & 0o7777 == 0o1777
    take(tmp_path, "GPU-1/../b c").release()
    assert (tmp_path / "gpu-GPU-1____b_c.lock").exists()


def test_a_wait_is_told_when_who_is_waited_for_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And looks ten times a second."""
    told: list[str] = []
    slept: list[float] = []
    answers = iter([(None, "a"), (None, "a"), (None, "b"), ("locks", "")])
    monkeypatch.setattr(gpu_locks, "_try_all", lambda gpus, folder: next(answers))
    monkeypatch.setattr(gpu_locks.time, "sleep", slept.append)
    found: object = wait_for_gpus(["0"], cancelled=lambda: False, on_wait=told.append, folder=tmp_path)
    assert found == "locks" and told == ["a", "b"] and slept == [0.1] * 3


def test_a_lock_that_cannot_be_opened_is_named_with_the_reason(tmp_path: Path):
    (tmp_path / "gpu-0.lock").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").touch()
    with pytest.raises(JobError, match=r"^the GPU's lock .*gpu-0\.lock cannot be opened: .*; remove it$"):
        take(tmp_path, "0")


def test_a_lock_whose_name_is_no_text_is_told_as_far_as_it_is(tmp_path: Path):
    told: list[str] = []
    with gpu_locks._place("3", tmp_path).open("wb") as file:
        file.write(b"caf\xe9 " + "\u00fc".encode() * 300)
        file.flush()
        assert gpu_locks.try_lock(file)
        with pytest.raises(JobCancelled):
            take(tmp_path, "3", told=told)
    assert told == [f"waiting for GPU 3, in use by caf\ufffd {195 * chr(0xFC)}"]
