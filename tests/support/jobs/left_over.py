"""What a job could leave behind in this process and on this machine."""

from __future__ import annotations

import os
import threading

from patience import COMES_UP
from shared_memory import orphans


def held() -> dict[str, int]:
    """To be compared with what was there before."""
    links = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _open(name)]
    return {
        "files in memory": sum(link.startswith("/memfd:") for link in links),
        "pipes": sum(link.startswith("pipe:") for link in links),
        "shared memory": len(orphans()),
    }


def _open(name: str) -> bool:
    # That of the listing itself is closed by now.
    return os.path.lexists(f"/proc/self/fd/{name}")


def settled(seconds: float = COMES_UP) -> None:
    """Until no group is about to stop."""
    for thread in [thread for thread in threading.enumerate() if thread.name == "wan-stop"]:
        thread.join(seconds)
        assert not thread.is_alive()
