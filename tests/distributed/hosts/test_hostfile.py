"""Hostfiles: how they are read, who may stand in one, and which of them a workflow picks."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from jobs import stub_job
from wan_pack.distributed.hosts import hostfile as hosts
from wan_pack.distributed.hosts.hostfile import Hosts, HostsDir, read_hostfile
from wan_pack.distributed.job.job import Parallel
from wan_pack.nodes.host import host
from wan_pack.nodes.host.status import Status
from wan_pack.nodes.settings.hostfiles import hostfile_names, parallel_over
from wan_pack.nodes.settings.spread import DistributedConfig


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path):
    file = tmp_path / "hostfile"
    file.write_text("# ours\n\nnode-1.lan slots=8\n10.0.0.2   slots=8  # the second\n")
    assert read_hostfile(file) == Hosts(("node-1.lan", "10.0.0.2"), 8)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no machine"),
        ("a slots=2\na slots=2\n", "names 'a' twice"),
        ("a slots=2\nb slots=4\n", r"different slots \(a 2, b 4\)"),
        ("a\n", "the line 'a'; it must be NAME slots=N"),
        ("a slots=2; reboot\n", "it must be NAME slots=N"),
        ("x" * 70_000, r"^the hostfile .* cannot be read: .*over 65536 bytes"),
        ("a slots=1000\n", "the line 'a slots=1000'; it must be NAME slots=N"),
        ("x" * 100, "the line '" + "x" * 80 + "'; it must be"),
        ("".join(f"h{number} slots=1\n" for number in range(65)), "names more than 64 machines; it must name 1 to 64"),
    ],
)
def test_a_hostfile_that_is_wrong_is_refused_with_its_name_and_line(tmp_path: Path, text: str, says: str):
    (tmp_path / "cluster").write_text(text)
    with pytest.raises(ValueError, match=says) as caught:
        read_hostfile(tmp_path / "cluster")
    assert "cluster" in str(caught.value)
    with pytest.raises(ValueError, match=r"^the hostfile .*gone cannot be read: "):
        read_hostfile(tmp_path / "gone")


@pytest.mark.parametrize("name", ["-oProxyCommand=id", "a,b", "root@a", "a b", "$(id)", "[1-9]", ""])
def test_a_host_that_a_shell_or_ssh_would_take_apart_is_refused(name: str):
    with pytest.raises(ValueError, match="names or IPv4 addresses"):
        Parallel(gpu_count=2, hosts=("a", name))


def test_a_workflow_picks_a_hostfile_that_is_there_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host, "hostfiles_folder", lambda: tmp_path / "hostfiles")
    assert hostfile_names() == []
    (tmp_path / "hostfiles").mkdir()
    (tmp_path / "hostfiles" / "cluster").write_text("a slots=2\nb slots=2\n")
    (tmp_path / "secret").write_text("c slots=2\n")
    monkeypatch.setattr(hosts, "list_gpus", list)
    chosen = DistributedConfig(gpu_count=0, use_ulysses=True, use_fsdp=False, offload_model=False, hostfile="cluster")
    status = Status()
    base = Parallel(gpu_count=1, keep_warm_seconds=60.0)
    parallel = parallel_over(chosen, base, guided=True, status=status)
    assert (parallel.hosts, parallel.gpu_count, parallel.keep_warm_seconds) == (("a", "b"), 4, 0)
    assert any("keep_warm_seconds has no effect" in line for line in status.warnings)
    for name in ("../secret", str(tmp_path / "secret"), "gone"):
        with pytest.raises(ValueError, match="hostfile is"):
            parallel_over(dataclasses.replace(chosen, hostfile=name), base, guided=True, status=status)


def test_slots_of_all_machines_together_have_a_bound(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hosts, "list_gpus", list)
    base = Parallel(gpu_count=1)
    assert hosts.over_hosts(base, hosts.Hosts(("a", "b"), 32), guided=False).gpu_count == 64
    for slots in (0, 33):
        with pytest.raises(ValueError, match=f"has {2 * slots} slots in all; it must be 1 to 64"):
            hosts.over_hosts(base, hosts.Hosts(("a", "b"), slots), guided=False)


def test_lines_may_be_indented_and_commented(tmp_path: Path):
    file = tmp_path / "two"
    file.write_text("# machines\n\n  a slots=2\t\n\tb   slots=2   # the other\n   # and no more\n")
    assert hosts.read_hostfile(file) == hosts.Hosts(("a", "b"), 2)


def test_as_many_machines_as_a_job_may_have_are_read(tmp_path: Path):
    file = tmp_path / "many"
    file.write_text("".join(f"h{number} slots=1\n" for number in range(64)))
    assert read_hostfile(file) == Hosts(tuple(f"h{number}" for number in range(64)), 1)


@pytest.mark.parametrize(("slots", "guided", "asked", "cfg"), [
    (2, True, None, True), (2, False, None, False), (1, True, None, False), (2, True, False, False),
    (2, False, True, True),
])  # fmt: skip
def test_settings_go_over_to_other_machines(
    slots: int, guided: bool, asked: bool | None, cfg: bool, monkeypatch: pytest.MonkeyPatch
):
    """Each computes on its first GPUs, or on those that are named; where this one has none, on CPU processes."""
    base = Parallel(gpu_count=1, keep_warm_seconds=60.0, attention="flash")
    three, first, named = Hosts(("a", "b", "c"), slots), ("0", "1")[:slots], ("5", "7")[:slots]
    for present, asked_for, gpu_ids in (([], (), ()), ([1], (), first), ([1], named, named)):
        monkeypatch.setattr(hosts, "list_gpus", lambda present=present: present)
        found = hosts.over_hosts(base, three, gpu_ids=asked_for, cfg_parallel=asked, guided=guided)
        assert (found.hosts, found.gpu_count, found.gpu_ids) == (three.names, 3 * slots, gpu_ids)
        assert (found.keep_warm_seconds, found.cfg_parallel, found.attention) == (0.0, cfg, "flash")


def test_of_one_machine_there_is_nothing_to_say_and_of_several_what_their_network_carries():
    warn = hosts.host_warnings
    assert warn(Parallel(gpu_count=2, hosts=("a",), use_fsdp=True)) == []
    half = Parallel(gpu_count=4, hosts=("a", "b"), cfg_parallel=True)
    assert warn(half) == []
    assert len(warn(dataclasses.replace(half, use_fsdp=True))) == 1
    assert len(warn(dataclasses.replace(half, cfg_parallel=False))) == 1
    assert len(warn(dataclasses.replace(half, cfg_parallel=False, use_fsdp=True))) == 2
    assert warn(Parallel(gpu_count=2, hosts=("a", "b"), cfg_parallel=True)) == []


def test_the_folder_of_a_group_says_what_its_agents_need(tmp_path: Path):
    """One agent on each machine; as many ranks as all of them have GPUs."""
    job = stub_job(gpu_count=6, hosts=("a", "b"))
    folder = HostsDir.create_for(tmp_path, job, {"torch": "2.11.0"})
    assert folder.path.parent == tmp_path
    assert json.loads(folder.group.read_text()) == {"ranks": 6}
    assert json.loads(folder.expected.read_text()) == {"torch": "2.11.0"}
    assert folder.hostfile.read_text() == "a slots=1\nb slots=1\n"
    assert folder.job.read_text() == job.to_json()
    assert folder.heartbeat.stat().st_mode & 0o777 == 0o600
    shutil.rmtree(folder.path)
