"""What is known of processes and ports, asked of this process alone."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from wan_pack.distributed.job.errors import JobError
from wan_pack.distributed.machine import processes
from wan_pack.distributed.machine.loopback import listen
from wan_pack.distributed.machine.processes import Process, members


def own() -> Process:
    found = Process.of(os.getpid())
    assert found is not None
    return found


@pytest.mark.parametrize("old_kernel", [False, True])
def test_a_signal_goes_to_the_process_that_was_seen_and_to_no_later_one(
    old_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signal 0 does nothing. Without descriptors of processes the pid is looked at just before."""
    sent: list[tuple[int, int]] = []

    def refuses(pid: int) -> int:
        raise OSError(38, "no such call")

    if old_kernel:
        monkeypatch.setattr(os, "pidfd_open", refuses)
        monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    else:
        monkeypatch.setattr(
            processes.signal, "pidfd_send_signal", lambda descriptor, number: sent.append((os.getpid(), number))
        )
    own().kill(0)
    assert sent == [(os.getpid(), 0)]
    Process(os.getpid(), own().started - 1).kill(0)
    assert sent == [(os.getpid(), 0)]


def test_members_of_a_group_are_found_behind_older_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their environment; what started before the group is not looked at, and what ends meanwhile hides no other."""
    name, value = next((name, value) for name, value in os.environ.items() if value and environ_has(name, value))
    monkeypatch.setattr(processes, "GROUP_VARIABLE", name)
    older, gone = Process(1, own().started - 1), Process(2**22 + 1, own().started)
    monkeypatch.setattr(processes, "_all", lambda: iter([(older, 0), (gone, 0), (own(), 0)]))
    assert members(Path(value), own().started) == [own()]
    assert members(Path(value), own().started + 1) == []
    assert members(Path(value + "x")) == []


def environ_has(name: str, value: str) -> bool:
    """As the process began, and as a path that is written like that."""
    began = Path("/proc/self/environ").read_bytes().split(b"\0")
    return os.fsencode(f"{name}={value}") in began and str(Path(value)) == value


def test_a_listener_is_on_this_machine_alone_and_a_taken_port_is_named() -> None:
    with listen(0) as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.1" and listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        with socket.create_connection((host, port), timeout=60):
            pass
        with pytest.raises(JobError, match=rf"master_port is {port}, and 127\.0\.0\.1:{port} cannot be used"):
            listen(port)
