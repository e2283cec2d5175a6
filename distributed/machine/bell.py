"""Where a process sleeps until another one wants something."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType


class Bell:
    """One end of a pipe with a name: who waits at it uses no processor, and is awake at once.

    What it rings for is found elsewhere, and looked for before each wait; a ring says only that there may be something.

    Args:
        path: of the pipe, made if it is missing; None: one that is in no folder, and ends with this process.
    """

    def __init__(self, path: Path | None = None) -> None:
        if path is None:
            self._descriptor, self._other = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            self.path = Path(f"/proc/{os.getpid()}/fd/{self._other}")
            return
        self._other, self.path = -1, path
        if not path.exists():
            os.mkfifo(path, 0o600)
        # For writing too: a pipe without a writer would be readable all the time.
        self._descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def __enter__(self) -> Bell:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def wait(self, seconds: float) -> None:
        """Sleeps until somebody rings, `seconds` at most."""
        # Not select, which knows no descriptors beyond 1023: ComfyUI may have many files open.
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        if poll.poll(seconds * 1000):
            os.read(self._descriptor, 4096)

    def close(self) -> None:
        """A second call does nothing."""
        for descriptor in (self._descriptor, self._other):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._other = -1


class BellRope:
    """The other end of a bell.

    Args:
        path: of the bell. It is opened once: the path of one in no folder may be another file's later.
    Raises:
        OSError: nobody waits there, or it is no pipe.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISFIFO(os.fstat(self._descriptor).st_mode):
            self.close()
            raise OSError(errno.EINVAL, "it is no bell", str(path))

    def ring(self) -> None:
        """Wakes who waits; nobody may do so any more."""
        with contextlib.suppress(OSError):
            os.write(self._descriptor, b"!")

    def close(self) -> None:
        """A second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def ring_all(paths: Iterable[Path]) -> None:
    """Rings the bells as they are found, in a folder that may go at any moment."""
    with contextlib.suppress(OSError):
        for path in paths:
            ring(path)


def ring(path: Path) -> None:
    """Wakes who waits at the bell of this path. Where nobody does yet nothing happens: he looks before he waits."""
    with contextlib.suppress(OSError):
        rope = BellRope(path)
        rope.ring()
        rope.close()
