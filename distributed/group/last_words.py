"""Why a group fails, told in memory: on a full disk no file can say it."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from ..job.json_files import write_json
from ..machine.memory_file import MemoryFile

WORDS_VARIABLE = "WAN_LAST_WORDS"
"""Environment variable with the path at which agent and ranks leave their last words."""
MAX_BYTES = 4 << 20


class LastWords:
    """What a group's agent and ranks have said."""

    def __init__(self) -> None:
        self._file = MemoryFile("wan-last-words")
        self.path = self._file.path

    def records(self) -> list[dict[str, Any]]:
        """In the order in which they were said; what is damaged is left out."""
        found = []
        for line in self._file.read(MAX_BYTES).splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                found += [record] if isinstance(record, dict) else []
        return found

    def close(self) -> None:
        self._file.close()


def leave_words(path: Path, record: dict[str, Any]) -> None:
    """Tells ComfyUI why this process ends, and writes it to `path` for those who look there, if there is room.

    Over several machines the file is all there is.
    """
    line = json.dumps(record).encode() + b"\n"
    if WORDS_VARIABLE in os.environ:
        with contextlib.suppress(OSError):
            descriptor = os.open(os.environ[WORDS_VARIABLE], os.O_WRONLY | os.O_APPEND)
            try:
                # In one piece: others may say something at the same time.
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
    with contextlib.suppress(OSError):
        write_json(path, record)
