"""Programs that a job starts beside its ranks: their end is seen at once, and none is waited for without end."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable

import pytest
from patience import AT_ONCE
from wan_pack.distributed.launch.launcher import JobFailed
from wan_pack.distributed.machine.programs import ask_program

pytestmark = pytest.mark.processes


def test_fault_33_a_killed_ffmpeg_ends_the_job_at_once(faulty: Callable[..., JobFailed]):
    """Real ranks, which decode and would for long."""
    error = faulty("ffmpeg dies", num_frames=9)
    folder = error.folder
    assert folder is not None
    assert time.time() - float((folder / "killed_at").read_text()) < AT_ONCE
    assert str(error).startswith("rank 0: RuntimeError: ")
    assert "ffmpeg ended with status -9" in str(error)
    assert not list(folder.glob(".video*"))


def test_fault_33_a_program_that_cannot_be_killed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    """As nvidia-smi inside a driver that hangs."""
    started: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: started.append(process))
    begin = time.monotonic()
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            ask_program(["sleep", "60"], timeout=0.3)
        assert time.monotonic() - begin < AT_ONCE
    finally:
        (process,) = started
        os.kill(process.pid, 9)
        process.wait()


def test_fault_33_a_programs_end_is_seen_at_once():
    begin = time.monotonic()
    answer = ask_program(["sh", "-c", "cat; echo words >&2; kill -KILL $$"], timeout=30, given=b"given")
    assert time.monotonic() - begin < AT_ONCE
    assert (answer.returncode, answer.stdout, answer.stderr) == (-9, b"given", b"words\n")
