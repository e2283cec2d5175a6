"""A disk on which nothing can be written any more, not even why."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jobs import Watch, run_stub, run_tiny, stub_job, tiny_job
from wan_pack.distributed.group.failures import advice
from wan_pack.distributed.job.errors import JobCancelled
from wan_pack.distributed.job.job import JobError
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.launch.launcher import JobFailed

DISK_MIB = 80
"""A little more than what a job asks for before it starts."""
HOUR = 3600.0
"""A time-out that is not waited for."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root, to mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.processes
@pytest.mark.parametrize("when", ["disk filled while loading", "disk filled"])
def test_fault_16_a_full_disk_is_named_though_nothing_can_be_written(
    stub_pack: Callable[..., None], disk: Path, when: str
):
    stub_pack(when)
    started = time.monotonic()
    with pytest.raises(JobFailed) as caught:
        run_stub(disk, stub_job(start_timeout=HOUR, stall_timeout=HOUR))
    assert time.monotonic() - started < HOUR / 2
    assert str(caught.value).startswith("rank 1: OSError: [Errno 28] No space left on device")
    assert "Free space on the disk" in str(caught.value)
    folder = caught.value.folder
    assert folder is not None and (folder / "filler").stat().st_size > 64 << 20
    with pytest.raises(OSError, match="No space left"):
        (folder / "more").write_bytes(bytes(1 << 16))


@pytest.mark.processes
def test_fault_16_processes_meet_on_no_disk(tiny_models: Path, tmp_path: Path):
    """A file through which they meet is waited at without end when a full disk has cut a record short."""
    found: set[str] = set()

    def act(folder: JobDir) -> None:
        (group,) = folder.path.parent.glob("wan-group-*")
        found.update(path.name for path in group.iterdir())

    watch = Watch(tmp_path, act, step=1)
    with pytest.raises(JobCancelled):
        run_tiny(tiny_job(tiny_models, steps=1000), tmp_path, on_progress=watch, cancelled=lambda: bool(watch.at))
    rest = {name for name in found if not name.startswith(("bell-", "request-"))}
    # The agent's own folder may come later than the ranks' first step.
    assert rest - {"torchrun"} == {"owner.lock", "group.json", "agent.log"}


def test_fault_16_the_log_may_be_all_that_names_it():
    log = "Traceback ...\nOSError: [Errno 28] No space left on device"
    text = "the agent ended with exit code 1"
    assert "Free space" in advice(text, log, out_of_memory=False, killed=False)
    assert advice(text, "NCCL version 2.28", out_of_memory=False, killed=False) == ""


@pytest.mark.processes
def test_fault_16_a_job_that_finds_the_disk_full_starts_nothing(disk: Path):
    (disk / "filler").write_bytes(bytes((DISK_MIB - 1) << 20))
    with pytest.raises(JobError, match=r"has \d+ MiB free; the job needs"):
        run_stub(disk)
    assert list((disk / "jobs").iterdir()) == []
