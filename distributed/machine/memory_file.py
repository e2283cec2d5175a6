"""A file in memory, for what a full disk must not hold up."""

from __future__ import annotations

import os
from pathlib import Path

STORE_VARIABLE = "WAN_STORE"
"""Environment variable with the path of the one through which a group's ranks meet."""


class MemoryFile:
    """A file in no folder and on no disk: others' files leave it its room, and it ends with the process that made it.

    Processes of the same user open it by its path, for as long as it is not closed.
    """

    def __init__(self, name: str) -> None:
        self._descriptor = os.memfd_create(name)
        self.path = Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")

    def read(self, limit: int) -> bytes:
        """From its beginning, at most `limit` bytes."""
        return os.pread(self._descriptor, limit, 0)

    def close(self) -> None:
        """A second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
