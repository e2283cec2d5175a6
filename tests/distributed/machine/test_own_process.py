"""What is known of processes and ports, asked of this process alone."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from wan_pack.distributed.job.errors import JobError
from wan_pack.distributed.machine import processes
from wan_pack.distributed.machine.loopback import listen
from wan_pack.distributed.machine.processes import Process, members


def own() -> Process:
    found = Process.of(os.getpid())
    assert found is not None
    return found


@pytest.mark.parametrize("lacks", ["nothing", "the kernel", "Python"])
def test_a_signal_goes_to_the_process_that_was_seen_and_to_no_later_one(
    lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signal 0 does nothing. Without descriptors of processes the pid is looked at just before."""
    sent: list[tuple[int, int]] = []

    def refuses(pid: int) -> int:
        raise OSError(38, "no such call")

    if lacks != "nothing":
        if lacks == "Python":
            monkeypatch.delattr(os, "pidfd_open")
        else:
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


STAT = "{pid} (a (b) c) {state} {parent} " + " ".join(["0"] * 17) + " {started} " + " ".join(["0"] * 29) + " {code}"


@pytest.fixture
def proc(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Files of /proc as they are said to be."""
    files: dict[str, str] = {}

    def read_text(path: Path, **_: object) -> str:
        if str(path) not in files:
            raise FileNotFoundError(str(path))
        return files[str(path)]

    monkeypatch.setattr(processes.Path, "read_text", read_text)
    return files


def seen(pid: int, state: str = "S", parent: int = 1, started: int = 7, code: int = 0) -> str:
    return STAT.format(pid=pid, state=state, parent=parent, started=started, code=code)


def test_a_process_is_the_one_that_was_seen_while_it_lives(proc: dict[str, str]) -> None:
    one = Process(40, 7)
    for state, alive, stopped in (("S", True, False), ("R", True, False), ("T", True, True), ("t", True, True),
                                  ("Z", False, False), ("X", False, False)):  # fmt: skip
        proc["/proc/40/stat"] = seen(40, state)
        assert (one.alive(), one.stopped()) == (alive, stopped), state
    proc["/proc/40/stat"] = seen(40, started=8)
    assert not one.alive() and Process.of(40) == Process(40, 8)
    proc.clear()
    assert not one.alive() and not one.stopped() and Process.of(40) is None


def test_an_exit_code_is_that_of_the_process_that_was_seen(proc: dict[str, str]) -> None:
    one = Process(40, 7)
    for stat, code in (
        (seen(40, "Z", code=3 << 8), 3), (seen(40, "Z", code=9), -9), (seen(40, "Z"), 0), (seen(40, code=3 << 8), None),
        (seen(40, "Z", started=8, code=9), None), (seen(40, "Z", code=9).rpartition(" ")[0], None),
    ):  # fmt: skip
        proc["/proc/40/stat"] = stat
        assert one.exit_code() == code, stat
    proc.clear()
    assert one.exit_code() is None


def test_which_signals_a_process_catches(proc: dict[str, str]) -> None:
    proc["/proc/40/status"] = f"Name:\tpython\nSigIgn:\t{1 << 9:016x}\nSigCgt:\t{1 << 9 | 1 << 1:016x}\n"
    assert [number for number in range(1, 32) if Process(40, 7).catches(number)] == [2, 10]
    proc["/proc/40/status"] = "Name:\tpython\n"
    assert not Process(40, 7).catches(10) and not Process(41, 7).catches(10)


def test_descendants_are_all_that_come_from_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {2: 1, 3: 2, 4: 2, 5: 4, 6: 5, 7: 1, 8: 7}
    monkeypatch.setattr(processes, "_all", lambda: iter((Process(pid, pid), parent) for pid, parent in tree.items()))
    assert {process.pid for process in processes.descendants(2)} == {3, 4, 5, 6}
    assert processes.descendants(6) == []


def test_all_processes_are_those_that_have_not_ended(proc: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.os, "listdir", lambda folder: ["1", "40", "41", "42", "self", "uptime"])
    proc |= {"/proc/1/stat": seen(1, parent=0), "/proc/40/stat": seen(40, "Z"), "/proc/42/stat": seen(42, "R", 40)}
    assert list(processes._all()) == [(Process(1, 7), 0), (Process(42, 7), 40)]


@pytest.mark.parametrize(
    ("code", "name"), [(0, None), (3, None), (-9, "SIGKILL"), (-15, "SIGTERM"), (-200, "signal 200")]
)
def test_signals_have_names(code: int, name: str | None) -> None:
    assert processes.signal_name(code) == name


@pytest.mark.parametrize("too_late", [False, True])
def test_a_rank_whose_parent_has_ended_meanwhile_ends_itself(too_late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    library = SimpleNamespace(prctl=lambda *given: asked.append(given))
    monkeypatch.setattr(processes.ctypes, "CDLL", lambda *_, **__: library)
    monkeypatch.setattr(os, "getppid", lambda: 1 if too_late else 40)
    monkeypatch.setattr(os, "kill", lambda pid, number: asked.append((pid, number)))
    processes.die_with_parent(40)
    assert asked == [(1, 9)] + [(os.getpid(), 9)] * too_late
