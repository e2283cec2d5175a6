"""The groups of processes that this ComfyUI keeps warm, and what makes it let them go."""

from __future__ import annotations

import asyncio
import functools

from ..distributed.pool import Pool
from . import host


@functools.cache
def pool() -> Pool:
    """One for the whole ComfyUI."""
    return Pool()


def release() -> int:
    """Ends the groups that wait; those at work end with their job. Returns how many ended now."""
    return pool().release()


def register() -> None:
    """Lets go of the GPUs on ComfyUI's "Free memory" (POST /free) and on POST /wan_distributed/release."""

    async def released() -> dict[str, int]:
        # In a thread: ending processes takes up to a second, in which the server must go on serving.
        return {"released": await asyncio.to_thread(release)}

    host.add_route("/wan_distributed/release", released)
    host.on_free_memory(released)
