"""Reading the logs of ranks, whatever is in them."""

from __future__ import annotations

import re
from collections import deque
from pathlib import Path

TAIL_LINES = 20
TAIL_BYTES = 8 << 10
READ_BYTES = 64 << 10
"""At one poll."""
MAX_BACKLOG = 1 << 20
"""Bytes behind the end of the log from which on it is skipped, not followed: a flood must cost nothing."""
LINES_PER_POLL = 50
MAX_LINE = 2000
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class LogFollower:
    """The lines of a growing log."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._rest = b""
        self._lines: deque[str] = deque()

    def new_lines(self) -> list[str]:
        """What came since the last call, at most LINES_PER_POLL lines; the others wait for the next call."""
        if len(self._lines) < LINES_PER_POLL:
            self._read()
        return [self._lines.popleft() for _ in range(min(LINES_PER_POLL, len(self._lines)))]

    def _read(self) -> None:
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, 2)
                skipped = size - self._position - READ_BYTES
                if skipped > MAX_BACKLOG:
                    self._lines.append(f"[{skipped} bytes of log skipped]")
                    self._position += skipped
                    self._rest = b""
                file.seek(self._position)
                data = file.read(READ_BYTES)
        except OSError:
            return
        self._position += len(data)
        whole, newline, rest = (self._rest + data).rpartition(b"\n")
        # A line that never ends is kept up to what would be shown of it.
        self._rest = rest[-MAX_LINE:]
        self._lines += clean_lines(whole + newline)


def log_tail(path: Path, *, lines: int = TAIL_LINES, limit: int = TAIL_BYTES) -> str:
    """The last lines of a log, at most `limit` bytes of it; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - limit))
            data = file.read(limit)
    except OSError:
        return ""
    return "\n".join(clean_lines(data)[-lines:])


def clean_lines(data: bytes) -> list[str]:
    """Bytes of a log -> lines. Of what \\r overwrote only the last state is kept; the undecodable is replaced."""
    text = _COLOURS.sub("", data.decode("utf-8", errors="replace"))
    lines = (line.rstrip("\r").rpartition("\r")[2][:MAX_LINE] for line in text.split("\n"))
    return ["".join(c if c.isprintable() or c == "\t" else "\ufffd" for c in line) for line in lines if line.strip()]
