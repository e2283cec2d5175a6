"""What a machine must have, and how ranks and their GPUs lie over machines."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from jobs import FAKE_AGENT, run_stub, stub_job
from patience import COMES_UP, until
from torch.testing._internal.distributed import fake_pg
from wan_pack.demo.comfyui import reserve_port
from wan_pack.distributed.group import worker_group
from wan_pack.distributed.hosts import host_agent as hosts_agent
from wan_pack.distributed.hosts import host_check as hosts_check
from wan_pack.distributed.hosts import hostfile as hosts
from wan_pack.distributed.hosts import network as hosts_network
from wan_pack.distributed.hosts.host_agent import Tether
from wan_pack.distributed.hosts.host_check import check_host, versions
from wan_pack.distributed.hosts.hostfile import Hosts, HostsDir, host_warnings, over_hosts
from wan_pack.distributed.hosts.hosts_group import HostsGroup
from wan_pack.distributed.hosts.network import address_toward, interface_of, open_store
from wan_pack.distributed.job.errors import JobError
from wan_pack.distributed.job.job import FileIdentity, Job, Parallel
from wan_pack.distributed.launch.launcher import JobFailed
from wan_pack.distributed.machine import import_paths
from wan_pack.distributed.machine.gpu_locks import GpuLocks
from wan_pack.distributed.machine.gpus import Gpu
from wan_pack.distributed.machine.loopback import LOOPBACK
from wan_pack.distributed.parallel.mesh import Mesh

TWO = Hosts(("a", "b"), 2)
GPU = Gpu(index="0", uuid="GPU-0", name="H100", total_bytes=80 << 30, free_bytes=80 << 30)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"gpu_count": 3}, "multiple of the 2 hosts"),
        ({"hosts": ("a", "a")}, "without repeats"),
        ({"keep_warm_seconds": 5.0}, "keep_warm_seconds is 5.0"),
        ({"more_follow": True}, "more_follow is True; it must be off with several machines"),
        ({"gpu_ids": ("0", "1", "2", "3")}, r"one per GPU of a machine \(2\)"),
    ],
)
def test_values_that_cannot_be_over_two_machines_are_refused(values: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        Parallel(**{"gpu_count": 4, "hosts": ("a", "b"), **values})


def test_hosts_survive_the_job_file():
    job = stub_job(gpu_count=4, hosts=("a", "b"), gpu_ids=("0", "1"))
    assert Job.from_json(job.to_json()) == job


def test_cfg_goes_over_the_machines_first(monkeypatch: pytest.MonkeyPatch):
    """Ranks are numbered machine by machine: of two machines, each is a row that shares a sequence."""
    monkeypatch.setattr(hosts, "list_gpus", lambda: [GPU])
    parallel = over_hosts(Parallel(gpu_count=1, keep_warm_seconds=9.0), TWO, guided=True)
    assert (parallel.gpu_count, parallel.gpu_ids, parallel.cfg_parallel) == (4, ("0", "1"), True)
    assert host_warnings(parallel) == []
    assert fake_pg, "its import registers the backend"
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=4)
    try:
        mesh = Mesh.of("cpu", 4, cfg=parallel.cfg_size)
        row, column = map(dist.get_process_group_ranks, (mesh.ulysses_group, mesh.cfg_group))
    finally:
        dist.destroy_process_group()
    assert [rank // parallel.gpus_per_host for rank in row] == [0, 0]
    assert [rank // parallel.gpus_per_host for rank in column] == [0, 1]


def test_a_layout_that_splits_sequences_or_weights_over_the_network_is_warned_of():
    base = Parallel(gpu_count=1, use_fsdp=True)
    assert [w.split(" ")[0] for w in host_warnings(over_hosts(base, TWO, guided=False))] == ["the", "use_fsdp"]
    three = over_hosts(base, Hosts(("a", "b", "c"), 2), guided=True)
    assert "3 machines" in host_warnings(three)[0]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Over two machines, of one file."""
    (tmp_path / "w.safetensors").write_bytes(b"weights")
    file = FileIdentity.of(tmp_path / "w.safetensors")
    job = stub_job(hosts=("a", "b"))
    return dataclasses.replace(
        job, model=dataclasses.replace(job.model, high_noise=(file,), low_noise=(file,), vae=(file,))
    )


def test_a_machine_like_the_first_passes(job: Job, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hosts_check, "list_gpus", list)
    check_host(job, versions())


@pytest.mark.parametrize("name", ["this pack", "Python", "torch"])
def test_a_machine_with_another_version_is_refused(job: Job, name: str):
    with pytest.raises(JobError, match=f"^{name} is .*, but 0.0 on the machine that starts the job"):
        check_host(job, {**versions(), name: "0.0"})


def test_every_file_of_the_pack_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hosts_check, "PACK", tmp_path)
    seen = {versions()["this pack"]}
    for name in ("distributed/rank/worker.py", "distributed/hosts/host_agent.py", "wan/model/kernels/norm.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        seen.add(versions()["this pack"])
    assert len(seen) == 4 and {len(one) for one in seen} == {12}


def test_a_machine_with_other_files_is_refused(job: Job, tmp_path: Path):
    path = tmp_path / "w.safetensors"
    os.utime(path, ns=(1, 1))
    with pytest.raises(JobError, match=r"changed at another time.* rsync -a"):
        check_host(job, versions())
    path.write_bytes(b"short")
    with pytest.raises(JobError, match="has 5 bytes, but 7 on the machine"):
        check_host(job, versions())
    path.unlink()
    with pytest.raises(JobError, match=r"w\.safetensors cannot be read: No such file"):
        check_host(job, versions())


def test_a_machine_with_other_gpus_is_refused(job: Job, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hosts_check, "list_gpus", lambda: [GPU])
    with pytest.raises(JobError, match="there are 1 GPUs, but the machine that starts the job has none"):
        check_host(job, versions())
    wants = dataclasses.replace(job, parallel=dataclasses.replace(job.parallel, gpu_ids=("1",)))
    with pytest.raises(JobError, match="GPU 1 is missing; the GPUs are: 0 H100"):
        check_host(wants, versions())


def test_a_folder_that_a_remote_shell_would_take_apart_is_refused(tmp_path: Path):
    (tmp_path / "a $(id)").mkdir()
    with pytest.raises(JobError, match="a remote shell may take apart"):
        HostsDir.create_for(tmp_path / "a $(id)", stub_job(hosts=("a",)), {})
    assert not list((tmp_path / "a $(id)").iterdir())


def test_a_folder_that_is_not_shared_is_named(tmp_path: Path):
    with pytest.raises(
        JobError, match=r"folder .*elsewhere cannot be read \(.*\); it must be on a file system that all"
    ):
        HostsDir(tmp_path / "elsewhere").read_job()
    # Or something else lies there on this machine.
    HostsDir(tmp_path).job.touch()
    os.truncate(HostsDir(tmp_path).job, 1 << 40)
    with pytest.raises(JobError, match="it must be on a file system that all machines share"):
        HostsDir(tmp_path).read_job()


def test_the_store_listens_on_one_address_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert address_toward(("alone",), 0) == LOOPBACK == address_toward(("127.0.0.1", "127.0.0.1"), 1)
    assert interface_of("127.0.0.1") == "lo"
    monkeypatch.setenv(hosts_network.ADDRESS_VARIABLE, "127.0.0.1")
    first = open_store(tmp_path / "store.json", listens=True, world=2, timeout=COMES_UP)
    second = open_store(tmp_path / "store.json", listens=False, world=2, timeout=COMES_UP)
    first.set("word", "given")
    assert second.get("word") == b"given"
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert [line[1] for line in listening if line[3] == "0A" and line[1].endswith(f":{first.port:04X}")] == [
        f"0100007F:{first.port:04X}"
    ]


def test_of_two_jobs_at_one_port_none_meets_the_others_ranks(tmp_path: Path):
    """Both found it free when they began; the second one's first rank comes too late."""
    with reserve_port() as reserved:
        port = reserved.getsockname()[1]
        first = open_store(tmp_path / "one.json", listens=True, world=2, timeout=COMES_UP, port=port)
        with pytest.raises(JobError, match=rf"master_port is {port}, and 127\.0\.0\.1:{port} cannot be used"):
            open_store(tmp_path / "two.json", listens=True, world=2, timeout=COMES_UP, port=port)
        with pytest.raises(JobError, match="where it listens"):
            open_store(tmp_path / "two.json", listens=False, world=2, timeout=0.2, port=port)
        assert open_store(tmp_path / "one.json", listens=False, world=2, timeout=COMES_UP).port == first.port


@pytest.mark.parametrize("how", ["silence", "folder gone"])
def test_an_agent_ends_when_the_launching_machine_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str):
    """Over a link that is cut nothing closes. On a clock of its own, which stands still unless it is put forward."""
    ended, now = threading.Event(), [0.0]
    monkeypatch.setattr(hosts_agent, "_end", lambda folder, node: ended.set())
    monkeypatch.setattr(hosts_agent, "time", SimpleNamespace(monotonic=lambda: now[-1], sleep=time.sleep))
    folder = HostsDir.create_for(tmp_path, stub_job(hosts=("a",)), {})
    tether = Tether(folder, 0, Parallel(gpu_count=1, stall_timeout=10.0))
    tether.start()
    for number in range(3):
        now.append(now[-1] + 9.0)
        folder.heartbeat.write_text(str(number))
        assert until(lambda: tether._heard == now[-1])
    assert not ended.is_set()
    if how == "folder gone":
        folder.remove()
    else:
        now.append(now[-1] + 11.0)
    assert ended.wait(COMES_UP)
    folder.remove()


def test_machines_take_their_gpus_one_after_the_other_and_begin_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In the order of their names, whatever the hostfile's: else two jobs could each hold what the other waits for."""
    names, reason = ("b", "a"), "waiting for GPU 0, in use by process 7"
    folder = HostsDir.create_for(tmp_path, stub_job(hosts=names), {})
    asked, returned, free = [], [], [threading.Event(), threading.Event()]

    def wait(gpu_ids: Any, *, on_wait: Callable[[str], None], **_: Any) -> GpuLocks:
        asked.append(threading.current_thread().name)
        on_wait(reason)
        assert free[int(asked[-1])].wait(COMES_UP)
        return GpuLocks([])

    def take(node: int) -> None:
        hosts_agent.take_gpus(folder, stub_job(hosts=names), node)
        returned.append(node)

    monkeypatch.setattr(hosts_agent, "wait_for_gpus", wait)
    threads = [threading.Thread(target=take, args=(node,), name=str(node), daemon=True) for node in range(2)]
    for thread in threads:
        thread.start()
    assert until(lambda: folder.waiting(names) == f"host a: {reason}")
    assert asked == ["1"]
    free[1].set()
    assert until(lambda: folder.waiting(names) == f"host b: {reason}")
    assert asked == ["1", "0"] and returned == []
    free[0].set()
    for thread in threads:
        thread.join(COMES_UP)
    assert sorted(returned) == [0, 1] and folder.waiting(names) == ""
    folder.remove()


@pytest.mark.processes
def test_a_wait_for_gpus_elsewhere_is_shown_and_no_time_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The agent never starts a rank: the time-out is exceeded, but counts from the end of the wait."""
    monkeypatch.setattr(worker_group, "AGENT", FAKE_AGENT)
    looks, shown, reason = [], [], "host b: waiting for GPU 0, in use by process 7"

    def waits(self: worker_group.WorkerGroup) -> str:
        looks.append(time.monotonic())
        return reason if looks[-1] - looks[0] < 1.5 else ""

    monkeypatch.setattr(worker_group.WorkerGroup, "waits", waits)
    with pytest.raises(JobFailed, match=r"did not finish loading for 1 s"):
        run_stub(
            tmp_path,
            stub_job(start_timeout=1.0),
            lambda path: path.write_text("sleep"),
            on_progress=lambda progress: shown.append(progress.text),
        )
    assert time.monotonic() - looks[0] >= 1.5, "not while it waited"
    assert reason in shown and shown[-1].startswith("starting ")


def test_every_machine_finds_packages_where_the_first_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """As on one machine, folders of PYTHONPATH first; the agent itself and, by its environment, its ranks."""
    packages = tmp_path / "packages"
    packages.mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{packages}:relative")
    job = stub_job(hosts=("a", "b"), gpu_count=2)
    group = SimpleNamespace(_job=job)
    folder = HostsGroup._create_folder(group, tmp_path)  # type: ignore[arg-type]
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(packages)])
    seen: list[Any] = []
    for name in ("_end_with_stdin", "Tether"):
        monkeypatch.setattr(hosts_agent, name, lambda *_: SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(hosts_agent, "check_host", lambda job, expected: seen.append(list(sys.path)))
    monkeypatch.setattr(hosts_agent, "take_gpus", lambda *_: SimpleNamespace(release=lambda: None))
    monkeypatch.setattr(hosts_agent, "address_toward", lambda *_: "127.0.0.1")
    monkeypatch.setattr(hosts_agent, "_run", lambda *_: seen.append(dict(os.environ)) or 0)
    with mock.patch.dict(os.environ):
        assert hosts_agent.main(folder) == 0
    path, environment = seen
    assert path[0] == str(packages) and "relative" not in path
    assert json.loads(environment[import_paths.VARIABLE])["first"] == [str(packages)]
    assert folder.started(1).exists() and folder.ended(1).exists() and not folder.failed(1).exists()
    folder.ended(1).unlink()
    monkeypatch.setattr(hosts_agent, "check_host", mock.Mock(side_effect=JobError("another torch")))
    assert hosts_agent.main(folder) == 1 and folder.ended(1).exists()
    said = capfd.readouterr().err
    assert "another torch" in said and "Traceback" not in said
    assert json.loads(folder.failed(1).read_text())["message"] == "JobError: another torch"
    folder.remove()
