"""The groups of processes that this ComfyUI keeps warm, and what makes it let them go."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping
from typing import Any

from ...distributed.job.job import VaeJob
from ...distributed.job.progress import Progress
from ...distributed.launch.group_evaluator import GroupEvaluators
from ...distributed.launch.pool import Pool
from ...distributed.launch.vae_calls import VaeCalls
from . import groups, host

_pool = Pool()
"""Not made when it is first asked for: the page asks on another thread than the nodes, and each could make one."""


def pool() -> Pool:
    """One for the whole ComfyUI."""
    return _pool


class Waits:
    """Logs what a sampler of ComfyUI's waits for, such as a GPU that another program has: its node says nothing."""

    def __init__(self) -> None:
        self._said = ""

    def __call__(self, progress: Progress) -> None:
        message = progress.message if progress.phase == "start" else ""
        if message and message != self._said:
            host.log(message)
        self._said = message


class Frames:
    """Shows on ComfyUI's bar of the node that runs how far a VAE is, and logs what it waits for."""

    def __init__(self) -> None:
        self._waits = Waits()

    def __call__(self, progress: Progress) -> None:
        self._waits(progress)
        # A cancelled job ends in its own way; the bar would raise.
        if progress.phase in VaeJob.STOPS_IN and progress.total and not host.interrupted():
            host.progress_bar(progress.total, None).update_absolute(progress.step)


@functools.cache
def vae_calls() -> VaeCalls:
    """Of ComfyUI's VAE nodes, on groups of the pool."""
    return VaeCalls(
        pool(),
        evaluators().rest,
        parent=host.jobs_folder(),
        failed=host.failed_folder(),
        on_progress=Frames(),
        on_log_line=host.log,
        cancelled=host.interrupted,
    )


@functools.cache
def evaluators() -> GroupEvaluators:
    """Of samplers of ComfyUI's, on groups of the pool."""
    return GroupEvaluators(
        pool(),
        parent=host.jobs_folder(),
        failed=host.failed_folder(),
        on_progress=Waits(),
        on_log_line=host.log,
        cancelled=host.interrupted,
    )


def release(group_id: str | None = None) -> int:
    """Ends the groups that wait, or the one of this id; those at work end with their job. Returns how many ended."""
    return pool().release(group_id)


def register() -> None:
    """Lets go of the GPUs on ComfyUI's "Free memory" (POST /free) and on POST /wan_distributed/release, {"group": id}
    for one group, with the header X-Wan-Distributed; GET /wan_distributed/groups lists them.
    """

    # In threads: ending processes takes up to a second, nvidia-smi longer, in which the server must go on serving.
    async def released(sent: Mapping[str, Any]) -> dict[str, int]:
        return {"released": await asyncio.to_thread(release, sent.get("group"))}

    async def listed(_: Mapping[str, Any]) -> dict[str, Any]:
        return {"groups": await asyncio.to_thread(lambda: groups.shown(pool().view()))}

    host.add_route("POST", "/wan_distributed/release", released)
    host.add_route("GET", "/wan_distributed/groups", listed)
    host.on_free_memory(lambda: asyncio.to_thread(release))
