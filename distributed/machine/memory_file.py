"""A file in memory, for what a full disk must not hold up."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from pathlib import Path

STORE_VARIABLE = "WAN_STORE"
"""Environment variable with the path of the one through which a group's ranks meet."""


POPULATE_WRITE = 23
"""Linux' MADV_POPULATE_WRITE, of 5.14 and later."""
AT_A_TIME = 8 << 20
"""Bytes between two looks at whether it is still wanted, in which others of the process cannot map memory."""


class _Descriptor:
    _descriptor: int

    def close(self) -> None:
        """What is mapped stays. A second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class MemoryFile(_Descriptor):
    """A file in no folder and on no disk: others' files leave it its room, and it ends with the process that made it.

    Processes of the same user open it by its path, for as long as it is not closed.
    """

    def __init__(self, name: str) -> None:
        self._descriptor = os.memfd_create(name)
        self.path = Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")

    def read(self, limit: int) -> bytes:
        """From its beginning, at most `limit` bytes."""
        return os.pread(self._descriptor, limit, 0)

    def map(self, size: int) -> mmap.mmap:
        """Its first `size` bytes, shared with all that map them. It grows to that; what is new is zeros."""
        if os.fstat(self._descriptor).st_size < size:
            os.ftruncate(self._descriptor, size)
        return mmap.mmap(self._descriptor, size)


class OpenedMemory(_Descriptor):
    """Another process' `MemoryFile`, to read and to write, for as long as this one wants.

    Args:
        path: as that process has it. It is opened once: later it may be another file's.
    Raises:
        OSError: that process has ended or closed it, or it is no file in memory.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if not os.readlink(f"/proc/self/fd/{self._descriptor}").startswith("/memfd:"):
            self.close()
            raise OSError(errno.EINVAL, "it is no file in memory", str(path))

    def map(self, size: int) -> mmap.mmap:
        """Its first `size` bytes. Raises ValueError if it is smaller."""
        there = os.fstat(self._descriptor).st_size
        if there < size:
            raise ValueError(f"a file in memory has {there} bytes; it must have {size}")
        return mmap.mmap(self._descriptor, size)


class Populating:
    """Has the system find memory for a part of a mapping, on a thread: before something is written there.

    New pages take a second for some GB. Those that it does not find are found when they are written.
    """

    def __init__(self, memory: mmap.mmap, part: slice) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(memory, part), name="wan-memory", daemon=True)
        self._thread.start()

    def _run(self, memory: mmap.mmap, part: slice) -> None:
        first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for at in range(part.start // mmap.PAGESIZE * mmap.PAGESIZE, part.stop, AT_A_TIME):
            if self._over.is_set() or advise(first + at, min(AT_A_TIME, part.stop - at), POPULATE_WRITE):
                return

    def stop(self) -> None:
        """Waits for the piece that it is at."""
        self._over.set()
        self._thread.join()
