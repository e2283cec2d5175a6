"""What the agent of one of several machines starts, and when it ends its part: without a rank."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch.distributed.elastic.rendezvous as rendezvous
from jobs import stub_job
from wan_pack.distributed.group.failures import RankFailure
from wan_pack.distributed.hosts import host_agent
from wan_pack.distributed.hosts.host_agent import Tether
from wan_pack.distributed.hosts.hostfile import HostsDir
from wan_pack.distributed.hosts.network import ADDRESS_VARIABLE
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.machine.import_paths import VARIABLE
from wan_pack.distributed.machine.processes import GROUP_VARIABLE

JOB = stub_job(hosts=("a", "b"), gpu_count=4, start_timeout=77.0)


class Enough(Exception):
    """All that is looked at has happened."""


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    folder = HostsDir.create_for(tmp_path, JOB, {})
    yield folder
    folder.remove()


def test_torchrun_runs_the_ranks_of_this_machine_and_meets_the_others_in_the_folder(
    folder: HostsDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    meets: dict[str, Any] = {}
    monkeypatch.setattr(host_agent, "run_ranks", lambda *how: (given.append(how), 5)[1])
    monkeypatch.setattr(rendezvous.rendezvous_handler_registry, "register", meets.__setitem__)
    assert host_agent._run(folder, JOB, 1) == 5
    ((path, options, failed),) = given
    assert (path, failed) == (folder.path, folder.failed(1))
    assert options == [
        "--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=hosts", f"--rdzv-endpoint={folder.agents_store}",
        "--local-addr=node-001", f"--log-dir={folder.path}/torchrun-1",
    ]  # fmt: skip
    asked: list[Any] = []
    monkeypatch.setattr(host_agent, "open_store", lambda *of, **how: (asked.append((*of, how)), 1 / 0)[1])
    for node in (0, 1):
        host_agent._run(folder, JOB, node)
        with pytest.raises(ZeroDivisionError):
            meets["hosts"](SimpleNamespace(run_id="x"))
        assert asked.pop() == (folder.agents_store, {"listens": node == 0, "world": 2, "timeout": 77.0})


@pytest.mark.parametrize(("address", "interface"), [("10.0.0.2", "eth7"), ("127.0.0.1", "lo")])
def test_ranks_talk_over_the_interface_toward_the_others(
    folder: HostsDir, address: str, interface: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are known by their machine, also where two agents share one."""
    asked: list[Any] = []
    monkeypatch.setattr(host_agent, "address_toward", lambda *of: (asked.append(of), address)[1])
    monkeypatch.setattr(host_agent, "interface_of", lambda one: "eth7" if one == address else "")
    with mock.patch.dict(os.environ, {"A_SECRET": "x", "NCCL_DEBUG": "INFO"}):
        host_agent._enter_environment(folder, JOB, 1, "paths")
        entered = dict(os.environ)
    assert asked == [(("a", "b"), 1)]
    assert entered["GLOO_SOCKET_IFNAME"] == entered["NCCL_SOCKET_IFNAME"] == interface
    assert (entered[VARIABLE], entered[ADDRESS_VARIABLE]) == ("paths", address)
    assert entered[GROUP_VARIABLE] == str(folder.mark(1)) == f"{folder.path}/node-1"
    assert "A_SECRET" not in entered and entered["NCCL_DEBUG"] == "INFO"


def tether(folder: HostsDir, monkeypatch: pytest.MonkeyPatch, ended: list[Any], sleeps: list[float]) -> Tether:
    """Whose clock stands still. Sleeping ends what would go on for ever, but for threads that other tests have left."""

    def sleep(seconds: float) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(seconds)
            return
        sleeps.append(seconds)
        if len(sleeps) > 2:
            raise Enough

    monkeypatch.setattr(host_agent, "_end", lambda *of: ended.append(of))
    monkeypatch.setattr(host_agent, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=sleep))
    return Tether(folder, 1, Parallel(gpu_count=4, hosts=("a", "b")))


@pytest.mark.parametrize("told", [True, False])
def test_a_rank_that_is_lost_here_ends_this_machines_part(
    folder: HostsDir, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With how it ended, unless the agent has said so already."""
    ended: list[Any] = []
    asked: list[Any] = []
    requests, looks = iter([None, "job"]), iter([False, True])
    made = tether(folder, monkeypatch, ended, [])
    monkeypatch.setattr(folder, "read_request", lambda number: next(requests) if number == 1 else 1 / 0)
    monkeypatch.setattr(host_agent, "read_ranks", lambda job, ranks, *, here: asked.append((job, ranks, here)))
    failure = RankFailure(rank=3, exitcode=-9, signal="SIGKILL")
    monkeypatch.setattr(
        host_agent, "LostRanks", lambda job: SimpleNamespace(look=lambda ranks: next(looks), failures=[failure])
    )  # fmt: skip
    if told:
        folder.failed(1).write_text("told")
    made._look_at_ranks()
    assert asked == [("job", range(2, 4), True)] * 2 and ended == [(folder, 1)]
    if told:
        assert folder.failed(1).read_text() == "told"
    else:
        said = {"failures": [{"rank": 3, "exitcode": -9, "signal": "SIGKILL"}]}
        assert json.loads(folder.failed(1).read_text()) == said


def test_the_stacks_of_ranks_that_can_tell_them_are_asked_for_once(
    folder: HostsDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A heartbeat that cannot be read for a moment is no new one, and none that is gone."""
    killed: list[Any] = []
    made = tether(folder, monkeypatch, [], [])
    made._heard = -5.0

    def process(name: str, *, catches: bool = True, stopped: bool = False) -> Any:
        return SimpleNamespace(
            catches=lambda number: catches and number == signal.SIGUSR1, stopped=lambda: stopped,
            kill=lambda number: killed.append((name, number)),
        )  # fmt: skip

    monkeypatch.setattr(
        host_agent, "descendants",
        lambda pid: [process("young", catches=False), process("frozen", stopped=True), process("rank")]
        if pid == os.getpid() else [],
    )  # fmt: skip
    folder.stacks.mkdir(exist_ok=True)
    folder.heartbeat.unlink()
    folder.heartbeat.mkdir()
    with pytest.raises(Enough):
        made._listen()
    assert killed == [("rank", signal.SIGUSR1)]
    assert made._heard == -5.0 and not made._gone
    folder.heartbeat.rmdir()
    made._listen()
    assert made._gone


def test_machines_are_silent_no_longer_than_half_a_minute(folder: HostsDir) -> None:
    for stall, silence in ((10.0, 10.0), (30.0, 30.0), (600.0, 30.0)):
        assert Tether(folder, 0, Parallel(gpu_count=2, hosts=("a",), stall_timeout=stall))._silence == silence


def test_what_else_goes_wrong_is_told_with_its_place(
    folder: HostsDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where the folder is still there to tell it."""
    monkeypatch.setenv("RANK", "0")
    for name in ("_end_with_stdin", "Tether"):
        monkeypatch.setattr(host_agent, name, lambda *_: SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(host_agent, "check_host", lambda job, expected: {}["nothing"])
    assert host_agent.main(folder) == 1
    said = json.loads(folder.failed(0).read_text())
    assert said == {"message": "KeyError: 'nothing'", "failures": []} and folder.ended(0).exists()
    assert "Traceback" in capfd.readouterr().err
    started = json.loads(folder.started(0).read_text())
    assert started["pid"] == os.getpid() and started["hostname"]

    def gone(job: Any, expected: Any) -> None:
        folder.remove()
        raise OSError("gone")

    monkeypatch.setattr(host_agent, "check_host", gone)
    assert host_agent.main(folder) == 1 and not folder.path.exists()


def test_what_ends_a_machines_part_ends_all_below_it_and_says_so(
    folder: HostsDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there still is a folder to say it in."""
    ended: list[Any] = []
    monkeypatch.setattr(host_agent, "end_all", lambda mark, confirm: (ended.append(mark), confirm()))
    monkeypatch.setattr(host_agent, "wait_for_end_of_stdin", lambda: ended.append("stdin"))
    host_agent._end_with_stdin(folder, 1)
    assert ended == ["stdin", folder.mark(1)] and folder.ended(1).exists()
    folder.remove()
    host_agent._end(folder, 1)
    assert not folder.path.exists()
