"""What other programs, other users and ComfyUI's environment can do to a job: nothing."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import FAKE_AGENT, ODD_NAME, Watch, agent_of, rank_of, run_stub, run_tiny, stub_job, tiny_job
from patience import COMES_UP
from wan_pack.demo.comfyui import reserve_port
from wan_pack.distributed.group import worker_group
from wan_pack.distributed.group.environment import child_environment
from wan_pack.distributed.job.errors import JobCancelled
from wan_pack.distributed.job.job import JobError, Parallel, Text
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.job.json_files import read_json
from wan_pack.distributed.launch.launcher import Result
from wan_pack.distributed.machine.loopback import listen
from wan_pack.distributed.machine.processes import Process

RunFake = Callable[..., Result]


def listening(processes: list[Process]) -> set[str]:
    """Local addresses, as in /proc/net/tcp, on which the processes listen."""
    inodes = set()
    for process in processes:
        for link in Path(f"/proc/{process.pid}/fd").iterdir():
            # A file may be closed by now.
            with contextlib.suppress(OSError):
                target = os.readlink(link)
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1])
    return found


@pytest.mark.processes
def test_fault_12_two_jobs_at_once_beside_a_program_on_torchs_own_port(stub_pack: Callable[..., None], tmp_path: Path):
    stub_pack("good", seconds=1.0)
    results: list[Result] = []
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Another program may have it already, to the same end.
        with contextlib.suppress(OSError):
            taken.bind(("127.0.0.1", 29500))
            taken.listen()
        threads = [
            threading.Thread(target=lambda name=name: results.append(run_stub(tmp_path / name)), daemon=True)
            for name in ("one", "two")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(COMES_UP)
    assert len({result.info["id"] for result in results}) == 2
    for result in results:
        result.remove()


@pytest.mark.processes
def test_fault_12_a_chosen_port_that_is_taken_is_named(run_fake: RunFake):
    with reserve_port() as reserved:
        port = reserved.getsockname()[1]
        with listen(port), pytest.raises(JobError, match=rf"master_port is {port}, .* Choose another port, or 0"):
            run_fake("good", master_port=port)
        run_fake("good", master_port=port).remove()


@pytest.mark.processes
def test_fault_14_a_port_on_loopback_and_no_other_listener(tiny_models: Path, tmp_path: Path):
    """With `master_port` the store listens on 127.0.0.1 only; gloo's own listeners are there too."""
    seen: set[str] = set()
    published: dict[str, Any] = {}

    def look(folder: JobDir) -> None:
        seen.update(listening([agent_of(folder), rank_of(folder, 0), rank_of(folder, 1)]))
        (group,) = folder.path.parent.glob("wan-group-*")
        published.update(read_json(group / "store.json"))

    with reserve_port() as reserved, pytest.raises(JobCancelled):
        port = reserved.getsockname()[1]
        job = tiny_job(tiny_models, master_port=port, steps=1000)
        run_tiny(job, tmp_path, on_progress=Watch(tmp_path, look), cancelled=lambda: bool(seen))
    assert f"0100007F:{port:04X}" in seen
    assert published == {"host": "127.0.0.1", "port": port}, "not met by what another job's ranks know, the port alone"
    assert all(address.startswith("0100007F:") for address in seen), seen


@pytest.mark.processes
def test_fault_14_no_name_server_is_asked(fails: Callable[..., Any]):
    """torchrun asks for the machine's full name unless told an address; without a name server that hangs."""
    error = fails("raise")
    assert error.folder is not None
    assert socket.gethostname() not in (error.folder / "logs" / "agent.log").read_text()


@pytest.mark.processes
def test_fault_24_nothing_a_user_typed_is_on_the_command_line(
    run_fake: RunFake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    seen: list[list[str]] = []
    popen = worker_group.subprocess.Popen
    monkeypatch.setattr(worker_group.subprocess, "Popen", lambda argv, **kw: seen.append(argv) or popen(argv, **kw))
    run_fake("good").remove()
    # What looks whether this machine can make videos, such as ffmpeg, is told nothing of the job.
    ((python, unbuffered, agent, role, folder),) = [argv for argv in seen if "agent" in argv]
    assert not any(str(tmp_path) in part for argv in seen if "agent" not in argv for part in argv)
    assert (python, unbuffered, agent, role) == (sys.executable, "-u", str(FAKE_AGENT), "agent")
    assert Path(folder).parent == tmp_path / "jobs"
    assert Path(folder).name.startswith("wan-group-")


def test_fault_24_a_prompt_arrives_as_it_was_typed(tmp_path: Path):
    for prompt in ("--nproc-per-node=9 ${local_rank} $(id)", "-rf", "'; rm -rf / #", "\u202e\u0301\U0001f98a\x00\n"):
        folder = JobDir.create(tmp_path)
        folder.write_job(with_text(prompt))
        read = folder.read_job()
        assert read.text is not None and read.text.prompt == prompt
        folder.remove()


def with_text(prompt: str) -> Any:
    import dataclasses

    job = stub_job()
    model = dataclasses.replace(job.model, text_encoder=job.model.vae)
    return dataclasses.replace(job, model=model, text=Text(prompt=prompt))


PLANTED = {
    "HF_TOKEN": "secret", "AWS_SECRET_ACCESS_KEY": "secret", "TORCH_HUB_TOKEN": "secret", "NCCL_PASSWORD": "secret",
    "PET_NPROC_PER_NODE": "1", "PYTHON_EXEC": "/bin/echo", "RANK": "7", "WORLD_SIZE": "9", "MASTER_ADDR": "evil",
    "LD_PRELOAD": "x", "PYTHONPATH": "/evil", "PYTHONSTARTUP": "/evil", "BASH_ENV": "/evil",
}  # fmt: skip


def test_fault_25_the_environment_is_an_allowlist(tmp_path: Path):
    kept = {"PATH": "/bin", "HOME": "/home/me", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "3"}
    allocators = {
        "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync,expandable_segments:True",
        "PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync",
    }
    child = child_environment(Parallel(gpu_count=2, gpu_ids=("4", "1")), tmp_path, {**PLANTED, **kept, **allocators})
    assert {name: child[name] for name in kept} == kept
    assert not {*PLANTED, "PYTORCH_ALLOC_CONF"} & set(child)
    assert "secret" not in child.values()
    assert child["CUDA_VISIBLE_DEVICES"] == "4,1"
    assert child["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.processes
def test_fault_25_secrets_and_hijacks_do_not_reach_a_rank(
    stub_pack: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    for name, value in PLANTED.items():
        if name != "LD_PRELOAD":  # This test's own children would complain of it.
            monkeypatch.setenv(name, value)
    stub_pack("environment")
    seen: list[dict[str, str]] = []

    def look(progress: Any) -> None:
        for path in (tmp_path / "jobs").glob("wan-job-*/environment.json"):
            if path.stat().st_size:
                seen.append(json.loads(path.read_text()))

    with pytest.raises(JobCancelled):
        run_stub(tmp_path, cancelled=lambda: look(None) or bool(seen))
    assert "secret" not in seen[0].values()
    assert not {"HF_TOKEN", "PET_NPROC_PER_NODE", "PYTHON_EXEC", "PYTHONPATH", "BASH_ENV"} & set(seen[0])
    assert (seen[0]["RANK"], seen[0]["WORLD_SIZE"]) == ("1", "2")
    assert ODD_NAME in str(worker_group.AGENT)
