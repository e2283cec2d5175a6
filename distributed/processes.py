"""Processes by identity: a pid alone may be another process a moment later. Linux, standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Process:
    """A process as it was seen."""

    pid: int
    started: int
    """Clock ticks after boot."""

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that has this pid now; None if there is none, or it only waits to be reaped."""
        stat = _stat(pid)
        return None if stat is None or stat[0] in "ZX" else cls(pid, stat[2])

    def alive(self) -> bool:
        return Process.of(self.pid) == self

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Signals this process, never one that got its pid later."""
        with contextlib.suppress(OSError):
            descriptor = os.pidfd_open(self.pid)
            try:
                # The descriptor pins the pid, so what is checked now is what is signalled.
                if self.alive():
                    signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)


def descendants(pid: int) -> list[Process]:
    """Children, their children, and so on."""
    children: dict[int, list[Process]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            stat = _stat(int(entry.name))
            if stat is not None and stat[0] not in "ZX":
                children.setdefault(stat[1], []).append(Process(int(entry.name), stat[2]))
    found: list[Process] = []
    todo = [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += [process.pid for process in below]
    return found


def kill_all(processes: Iterable[Process], timeout: float) -> list[Process]:
    """SIGKILLs the processes and waits. Returns those that are still there after `timeout` seconds."""
    left = list(processes)
    for process in left:
        process.kill()
    deadline = time.monotonic() + timeout
    while (left := [process for process in left if process.alive()]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def die_with_parent(parent: int) -> None:
    """Has the kernel SIGKILL this process when the thread that started it ends. Ends it now if that already happened.

    torchrun puts each rank into a session of its own, so no signal to a process group reaches it.

    Args:
        parent: pid of the process that should be the parent.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _stat(pid: int) -> tuple[str, int, int] | None:
    """(state, parent's pid, start time) from /proc/<pid>/stat."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name in parentheses may hold spaces and parentheses; what follows the last one does not.
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[1]), int(fields[19])
