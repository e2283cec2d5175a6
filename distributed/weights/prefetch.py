"""Reads the weights that a job needs later, while it works with those that it has."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from ..job.job import FileIdentity
from ..machine.host_memory import available_bytes

log = logging.getLogger(__name__)

OnRead = Callable[[int, int], None]
"""(read so far, in all)."""
PIECE_BYTES = 64 << 20
"""That one process reads in a row."""
BUFFER_BYTES = 1 << 20
"""Stays in a core's cache: what was read is thrown away."""
POLL = 0.1
"""Seconds between two looks at how far a thread is."""


class _Stopped(Exception):
    """Nobody waits for it any more."""


class Prefetch:
    """Reading on a thread of its own, from now on.

    Args:
        read: told what to call with how far it is, often: that call is what `stop` ends it by.
    """

    def __init__(self, read: Callable[[OnRead], None]) -> None:
        self._end: Future[None] = Future()
        self._stop = threading.Event()
        self._so_far = 0, 1
        # A daemon: a rank that fails does not wait for it.
        self._thread = threading.Thread(target=self._run, args=(read,), name="prefetch", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises what has gone wrong so far."""
        if self._end.done():
            self._end.result()

    def wait(self, on_read: OnRead) -> None:
        """Waits until all is read, and raises what has gone wrong. Tells `on_read` how far it is, now and then."""
        while self._thread.is_alive():
            self._thread.join(POLL)
            on_read(*self._so_far)
        self.check()

    def stop(self, wait: float | None = None) -> None:
        """Ends it, whatever is left to read.

        Args:
            wait: seconds, at most, for what is being read just now.
        """
        self._stop.set()
        self._thread.join(wait)

    def _run(self, read: Callable[[OnRead], None]) -> None:
        try:
            read(self._on_read)
            self._end.set_result(None)
        except _Stopped:
            self._end.set_result(None)
        except BaseException as error:
            self._end.set_exception(error)

    def _on_read(self, done: int, total: int) -> None:
        self._so_far = done, total
        if self._stop.is_set():
            raise _Stopped


def read_ahead(paths: Sequence[str], on_read: OnRead, *, part: int = 0, parts: int = 1) -> None:
    """Has the system keep files in its memory, so that who reads them next does not wait for the disk.

    Args:
        on_read: called with bytes.
        part, parts: this process's share, where several of a machine read ahead together.
    Raises:
        OSError: a file cannot be read.
    """
    # Not posix_fadvise: network file systems may ignore it, and it tells nothing of what cannot be read.
    buffer = memoryview(bytearray(BUFFER_BYTES))
    sizes = [os.path.getsize(path) for path in paths]
    before = 0
    for path, size in zip(paths, sizes, strict=True):
        with open(path, "rb", buffering=0) as file:
            for piece in range(part * PIECE_BYTES, size, parts * PIECE_BYTES):
                for start in range(piece, min(piece + PIECE_BYTES, size), BUFFER_BYTES):
                    os.preadv(file.fileno(), [buffer], start)
                on_read(before + min(piece + PIECE_BYTES, size), sum(sizes))
        before += size


def prefetch_files(files: Sequence[FileIdentity], *, part: int, parts: int) -> Prefetch:
    """`read_ahead` on a thread; nothing is read where the host's memory does not hold all of it."""
    paths, available = [file.path for file in files], available_bytes()
    if available is not None and available < sum(file.size for file in files):
        log.info("%s is not read ahead: host memory does not hold its files", paths[0])
        paths = []
    return Prefetch(partial(read_ahead, paths, part=part, parts=parts))
