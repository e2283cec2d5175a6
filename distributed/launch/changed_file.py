"""A file that another process replaces now and then."""

from __future__ import annotations

import os
from pathlib import Path


class ChangedFile:
    """Gives the content once for each time the file was replaced."""

    def __init__(self, path: Path, limit: int) -> None:
        """`limit`: bytes; a larger file is not read."""
        self._path, self._limit = path, limit
        self._seen: tuple[int, int] | None = None

    def read(self) -> bytes | None:
        """What is new, or None."""
        try:
            with self._path.open("rb") as file:
                stat = os.fstat(file.fileno())
                # Of a file made in the place of another the number may be the same, or the time, hardly both.
                seen = (stat.st_ino, stat.st_mtime_ns)
                if seen == self._seen or stat.st_size > self._limit:
                    return None
                data = file.read()
        except OSError:
            return None
        self._seen = seen
        return data
