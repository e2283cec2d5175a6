"""What is left in /dev/shm."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

FOLDER = "/dev/shm/"


def orphans() -> list[str]:
    """Files there that no living process holds. Those of programs beside the test, as a browser's, are held."""
    there, held = sorted(os.listdir(FOLDER)), set()
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with contextlib.suppress(OSError):
                held.update(line.partition(FOLDER)[2] for line in (process / "maps").read_text().splitlines())
                for descriptor in (process / "fd").iterdir():
                    with contextlib.suppress(OSError):
                        held.add(os.readlink(descriptor).partition(FOLDER)[2])
    # What was made or removed during the look is not left over.
    return [name for name in there if name not in held and os.path.exists(FOLDER + name)]
