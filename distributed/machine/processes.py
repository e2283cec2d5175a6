"""Processes by identity: a pid alone may be another process a moment later. Linux."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1
GROUP_VARIABLE = "WAN_GROUP_FOLDER"
"""Environment variable by which every process of a group is known, whoever its parent or session is by now."""
AGENT_VARIABLE = "WAN_AGENT_PID"
"""Environment variable that tells a rank which parent it must not outlive."""
SECONDS_BEFORE_THE_NEXT_LOOK = 0.2
"""For what was started meanwhile, while killed processes have not ended."""


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

    def stopped(self) -> bool:
        """Whether it was frozen, by SIGSTOP or a debugger."""
        stat = _stat(self.pid)
        return stat is not None and stat[0] in "Tt"

    def exit_code(self) -> int | None:
        """As subprocess gives it; None while it runs, and when its parent has asked for it."""
        try:
            text = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        fields = text.rpartition(")")[2].split()
        if fields[0] != "Z" or int(fields[19]) != self.started or len(fields) < 50:
            return None
        return os.waitstatus_to_exitcode(int(fields[49]))

    def catches(self, number: int) -> bool:
        """Whether it has a handler for this signal, so that sending it does not end it."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
        masks = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
        return bool(masks) and bool(int(masks[0], 16) >> (number - 1) & 1)

    def kill(self, number: int | None = None) -> None:
        """Signals this process, by default with SIGKILL, never one that got its pid later."""
        # Not as the default: Windows has no such signal, and ComfyUI there must be able to import this file.
        number = signal.SIGKILL if number is None else number
        with contextlib.suppress(ProcessLookupError, PermissionError):
            try:
                descriptor = os.pidfd_open(self.pid)
            except ProcessLookupError:
                return
            except (AttributeError, OSError):
                # An old kernel or a sandbox: between the check and the signal the pid would have to be reused.
                if self.alive():
                    os.kill(self.pid, number)
                return
            try:
                # The descriptor pins the pid, so what is checked now is what is signalled.
                if self.alive():
                    signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)


def descendants(pid: int) -> list[Process]:
    """Children, their children, and so on."""
    children: dict[int, list[Process]] = {}
    for process, parent in _all():
        children.setdefault(parent, []).append(process)
    found: list[Process] = []
    todo = [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += [process.pid for process in below]
    return found


def members(group_folder: Path, since: int = 0) -> list[Process]:
    """Every process of a group: agent, ranks, and what they started, also after their parents died.

    Args:
        since: clock ticks after boot; what started earlier is not looked at. Each look waits for a lock of the
            process, which one that reads files or is at its end may hold for long.
    """
    mark = os.fsencode(f"{GROUP_VARIABLE}={group_folder}")
    found = []
    for process, _ in _all():
        if process.started < since:
            continue
        with contextlib.suppress(OSError):
            if mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                found.append(process)
    return found


def kill_all(list_processes: Callable[[], Iterable[Process]], timeout: float) -> list[Process]:
    """SIGKILLs what `list_processes` names until it names nothing more.

    Returns:
        the processes that are still there after `timeout` seconds: in the middle of a driver call.
    """
    deadline = time.monotonic() + timeout
    quiet = 0
    while True:
        left = [process for process in list_processes() if process.alive()]
        for process in left:
            process.kill()
        # Twice: what is between fork and exec has no environment of its own yet.
        quiet = 0 if left else quiet + 1
        if quiet == 2 or time.monotonic() >= deadline:
            return left
        _wait_for(left, min(deadline, time.monotonic() + SECONDS_BEFORE_THE_NEXT_LOOK))


def _wait_for(processes: Sequence[Process], deadline: float) -> None:
    """Returns when all have ended, not before 0.01 s."""
    # Looks at them alone: to list all of the machine's processes over and over is what a busy one has no time for,
    # and those that were killed need its processors to end.
    while True:
        time.sleep(0.01)
        if time.monotonic() >= deadline or not any(process.alive() for process in processes):
            return


def die_with_parent(parent: int) -> None:
    """Has the kernel SIGKILL this process when the thread that started it ends. Ends it now if that already happened.

    torchrun puts each rank into a session of its own, so no signal to a process group reaches it.

    Args:
        parent: pid of the process that should be the parent.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def signal_name(exitcode: int) -> str | None:
    """The signal that ended a process with this return code, as subprocess gives it; None if it was none."""
    if exitcode >= 0:
        return None
    try:
        return signal.Signals(-exitcode).name
    except ValueError:
        return f"signal {-exitcode}"


def _all() -> Iterator[tuple[Process, int]]:
    """Every process that is not only waiting to be reaped, and its parent's pid."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            stat = _stat(int(name))
            if stat is not None and stat[0] not in "ZX":
                yield Process(int(name), stat[2]), stat[1]


def _stat(pid: int) -> tuple[str, int, int] | None:
    """(state, parent's pid, start time) from /proc/<pid>/stat."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name in parentheses may hold spaces and parentheses; what follows the last one does not.
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[1]), int(fields[19])
