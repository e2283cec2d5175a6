"""Videos get their names in processes that are killed at one system call after another.

As a script: a small process that forks those, as a fork of a process with all tests and torch takes many times as long.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

Put = Callable[[Any, str, Any], None]
"""`setattr`, or one that is taken back later."""
VIDEO = b"a whole video" * 1000
SYSTEM = ("posix", "_io", "fcntl")
"""Modules whose built-in functions are system calls."""
VIDEOS = 2
"""One after another, as a batch saves them."""


def small_comfyui(put: Put, folder: Path) -> Path:
    """Puts in ComfyUI's place what videos need of it. Returns the output folder."""
    from wan_pack.nodes.host import host
    from wan_pack.nodes.inference import outcome

    output = folder / "output"
    output.mkdir(exist_ok=True)

    def save_path(prefix: str, width: int, height: int) -> tuple[Path, str, int, str]:
        return output, prefix, 1 + len(list(output.glob(f"{prefix}_*"))), ""

    put(host, "save_path", save_path)
    put(host, "copy_video", lambda source, target, workflow: shutil.copyfile(source, target))
    put(host, "failed_folder", lambda: folder / "failed")
    put(outcome, "_read_latents", lambda path: None)
    return output


def no_unnamed_files(put: Put) -> None:
    """As on NFS."""
    from wan_pack.nodes.inference import draft

    opened = os.open

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return opened(path, flags, *rest, **named)

    put(draft.os, "open", refuse)


def nfs_locks(put: Put) -> None:
    """Exclusive ones only of files that are open for writing, as flock(2) says of NFS."""
    locked = fcntl.flock

    def lock(file: Any, how: int) -> None:
        if how & fcntl.LOCK_EX and fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        locked(file, how)

    put(fcntl, "flock", lock)


def no_links(put: Put) -> None:
    """As on exFAT and many network shares."""
    from wan_pack.nodes.inference import draft

    no_unnamed_files(put)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    put(draft.os, "link", refuse)


KINDS: dict[str, Callable[[Put], None]] = {
    "ordinary": lambda put: None,
    "no unnamed files": no_unnamed_files,
    "no links": no_links,
}


def save_videos(jobs: Path) -> None:
    """What the nodes do when a job is done."""
    from jobs import stub_job
    from wan_pack.distributed.group.leftovers import claim
    from wan_pack.distributed.job.job_folder import JobDir
    from wan_pack.distributed.launch.result import Result
    from wan_pack.nodes.inference import outcome

    for _ in range(VIDEOS):
        folder = JobDir.create(jobs)
        claim(folder)
        folder.video(".mp4").write_bytes(VIDEO)
        outcome.keep(stub_job(), Result(folder, {"video": {"width": 64, "height": 48}}, "", 1.0), "wan", {})


class KillAt:
    """A profiler that kills its process before a system call."""

    def __init__(self, number: int) -> None:
        self._left = number

    def __call__(self, frame: FrameType, event: str, what: Any) -> None:
        self._left -= event == "c_call" and what.__module__ in SYSTEM
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def kills(kind: str, folder: Path) -> Iterator[bool]:
    """Saves in a process that is killed before the first system call, then before the second, and so on. False at last,
    when it was not killed."""
    command = [sys.executable, __file__, kind, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as small:
        assert small.stdin is not None and small.stdout is not None
        killed, number = True, 0
        while killed:
            number += 1
            print(number, file=small.stdin, flush=True)
            status = int(small.stdout.readline())
            assert status in (0, -signal.SIGKILL)
            killed = status != 0
            yield killed


def _save_and_die(kind: str, folder: Path) -> None:
    """Reads at which system calls, one a line; says how each process ended."""
    small_comfyui(setattr, folder)
    KINDS[kind](setattr)
    # Imports at a first save would be system calls of every child's.
    import jobs  # noqa: F401
    from wan_pack.distributed.launch import result  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            sys.setprofile(KillAt(int(line)))
            save_videos(folder / "jobs")
            sys.setprofile(None)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from mount import mount_pack

    mount_pack()
    _save_and_die(sys.argv[1], Path(sys.argv[2]))
