"""A real torchrun agent over ranks without torch: how jobs end when more than one thing goes wrong."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden import ROOT
from wan_pack.distributed import group, launcher
from wan_pack.distributed.job import FileIdentity, Job, ModelFiles, Parallel, Sampling
from wan_pack.distributed.jobdir import JobDir
from wan_pack.distributed.launcher import JobCancelled, JobFailed, run_job
from wan_pack.distributed.processes import Process

STUB_WORKER = Path(__file__).parent / "stub_worker.py"
FILE = FileIdentity(path="/models/none.safetensors", size=1, mtime_ns=1)


def job(**settings: Any) -> Job:
    parallel = {"gpu_count": 2, "start_timeout": 60.0, "stall_timeout": 60.0, **settings}
    return Job(
        id="0f",
        model=ModelFiles(high_noise=(FILE,), low_noise=(FILE,), vae=(FILE,)),
        parallel=Parallel(**parallel),
        sampling=Sampling(width=64, height=48, num_frames=5, steps=4, seed=1),
    )


class Started:
    """Notes when the ranks have met, and acts then."""

    def __init__(self, parent: Path, act: Callable[[JobDir], None] = lambda folder: None) -> None:
        self.parent, self.act, self.at = parent, act, 0.0

    def __call__(self, progress: launcher.Progress) -> None:
        if progress.phase == "denoise" and progress.step >= 2 and not self.at:
            self.at = time.monotonic()
            (path,) = self.parent.glob("wan-job-*")
            self.act(JobDir(path))

    @property
    def seconds_ago(self) -> float:
        assert self.at, "the ranks never met"
        return time.monotonic() - self.at


@pytest.fixture
def stub_pack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Puts a copy of the pack whose ranks do `action` in the launcher's place."""

    def put(action: str) -> None:
        # Names that shells, torchrun's templates and Python's import take apart.
        target = tmp_path / "pack $$ ${local_rank}.v-1 \u00e9" / "distributed"
        shutil.copytree(ROOT / "distributed", target, ignore=shutil.ignore_patterns("__pycache__"))
        (target.parent / "wan").symlink_to(ROOT / "wan")
        shutil.copyfile(STUB_WORKER, target / "worker.py")
        (target / "fault.json").write_text(json.dumps({"action": action}))
        monkeypatch.setattr(group, "AGENT", target)

    return put


def run(folder: Path, the_job: Job, **callbacks: Any) -> None:
    run_job(the_job, lambda path: None, parent=folder / "jobs", failed=folder / "failed", **callbacks)


def child_of(folder: JobDir) -> Process:
    process = Process.of(int((folder.path / "child.pid").read_text()))
    assert process is not None
    return process


def gone_within(process: Process, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while process.alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not process.alive()


@pytest.mark.parametrize("action", ["frozen peer", "deaf peer"])
def test_a_failure_is_not_held_up_by_a_rank_that_does_not_end(
    stub_pack: Callable[[str], None], tmp_path: Path, action: str
):
    """torchrun alone waits 30 s for it, and then its SIGKILL looks like the cause."""
    stub_pack(action)
    started = Started(tmp_path / "jobs")
    with pytest.raises(JobFailed) as caught:
        run(tmp_path, job(), on_progress=started)
    assert started.seconds_ago < 8
    assert str(caught.value).startswith("rank 1: ValueError: the weights of layer 3 are bad")


def test_an_abort_after_a_peers_error_is_not_the_cause(stub_pack: Callable[[str], None], tmp_path: Path):
    stub_pack("abort")
    with pytest.raises(JobFailed) as caught:
        run(tmp_path, job())
    assert str(caught.value).startswith("rank 1: ValueError: the weights of layer 3 are bad")


def test_the_rank_that_is_behind_is_suspected(stub_pack: Callable[[str], None], tmp_path: Path):
    stub_pack("behind")
    with pytest.raises(JobFailed) as caught:
        run(tmp_path, job(stall_timeout=1.0))
    text = str(caught.value)
    assert text.startswith("rank 1 made no progress for 1 s in denoise at step 2 (stall_timeout is 1 s")
    assert "rank 0: denoise at step 3" in text
    assert "stand_still" in text, "its stack is shown"


def agent_of(folder: JobDir) -> Process:
    """The agent of the only group beside the job's folder."""
    (group_folder,) = folder.path.parent.glob("wan-group-*")
    (pid,) = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdecimal() and _words(entry)[-2:] == ["agent", str(group_folder)]
    ]
    process = Process.of(pid)
    assert process is not None
    return process


def _words(process: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return (process / "cmdline").read_bytes().decode().rstrip("\0").split("\0")
    return []


@pytest.mark.parametrize("ending", ["cancel", "agent", "rank"])
def test_what_a_rank_started_ends_with_the_job(stub_pack: Callable[[str], None], tmp_path: Path, ending: str):
    """A child in its own session, deaf to SIGTERM; its parents die first when the agent or the rank is killed."""
    stub_pack("child")
    children: list[Process] = []

    def act(folder: JobDir) -> None:
        children.append(child_of(folder))
        if ending == "agent":
            agent_of(folder).kill()
        if ending == "rank":
            os.kill(int(folder.read_json(folder.alive(1))["pid"]), signal.SIGKILL)

    started = Started(tmp_path / "jobs", act)
    with pytest.raises(JobCancelled if ending == "cancel" else JobFailed) as caught:
        run(tmp_path, job(), on_progress=started, cancelled=lambda: ending == "cancel" and bool(children))
    assert started.seconds_ago < 2
    assert not children[0].alive()
    if ending != "cancel":
        assert str(caught.value).startswith({"agent": "the agent was", "rank": "rank 1 was"}[ending])


PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
from golden import mount_pack
mount_pack()
from pathlib import Path
import test_endings
test_endings.group.AGENT = Path(sys.argv[3])
test_endings.run(Path(sys.argv[2]), test_endings.job())
"""


def test_what_a_rank_started_ends_with_comfyui(stub_pack: Callable[[str], None], tmp_path: Path):
    stub_pack("child")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(Path(__file__).parent), str(tmp_path), str(group.AGENT)]
    )
    try:
        deadline = time.monotonic() + 60
        while not (found := list((tmp_path / "jobs").glob("wan-job-*/rank[01].ready"))[1:]):
            assert time.monotonic() < deadline and parent.poll() is None
            time.sleep(0.05)
        folder = JobDir(found[0].parent)
        agent, child = agent_of(folder), child_of(folder)
        ranks = [Process.of(int(folder.read_json(folder.alive(rank))["pid"])) for rank in (0, 1)]
    finally:
        parent.kill()
        parent.wait()
    assert all(gone_within(process, 1) for process in [child, *ranks, agent])


def test_no_line_of_the_log_is_lost(stub_pack: Callable[[str], None], tmp_path: Path):
    stub_pack("chatter")
    lines: list[str] = []
    with pytest.raises(JobCancelled):
        run(tmp_path, job(), on_log_line=lines.append, cancelled=lambda: "line 399" in lines)
    assert [line for line in lines if line.startswith("line ")] == [f"line {n}" for n in range(400)]


def test_files_are_private_whatever_the_umask(stub_pack: Callable[[str], None], tmp_path: Path):
    stub_pack("kill")
    before = os.umask(0)
    try:
        with pytest.raises(JobFailed) as caught:
            run_job(
                job(), lambda path: path.write_bytes(b"") and None, parent=tmp_path / "jobs", failed=tmp_path / "failed"
            )
    finally:
        os.umask(before)
    folder = caught.value.folder
    assert folder is not None
    assert folder.stat().st_mode & 0o777 == 0o700
    open_to_others = [path.name for path in folder.rglob("*") if path.stat().st_mode & 0o077]
    assert not open_to_others


def test_no_name_server_is_asked(stub_pack: Callable[[str], None], tmp_path: Path):
    """torchrun asks for the machine's full name unless told an address; without a name server that hangs."""
    stub_pack("behind")
    with pytest.raises(JobFailed) as caught:
        run(tmp_path, job(stall_timeout=1.0))
    assert caught.value.folder is not None
    agent_log = (caught.value.folder / "logs" / "agent.log").read_text()
    assert socket.gethostname() not in agent_log
