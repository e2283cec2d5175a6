"""A cancelled job whose processes may stay: they are asked to stop after their step, and get a bounded time for it."""

from __future__ import annotations

import time
from collections.abc import Mapping

from ..group.signs_of_life import Seen, SignsOfLife
from ..group.worker_group import WorkerGroup
from ..job.errors import JobCancelled
from ..job.job import GroupJob
from ..job.job_folder import JobDir
from ..job.progress import Progress
from ..machine.processes import Process
from .group_source import GroupSource

SECONDS = 5.0
"""That ranks get beyond the rest of their step."""
MOST_SECONDS_PER_STEP = 20.0
"""With longer steps a new group is there as soon."""
POLL = 0.05


class Stopping(JobCancelled):
    """The job's processes stop after their step, and stay. Its folder goes when they have."""


def cancel(
    pool: GroupSource,
    group: WorkerGroup,
    job: GroupJob,
    folder: JobDir,
    ranks: Mapping[int, Seen],
    shown: Progress | None,
) -> JobCancelled:
    """What is to be raised: Stopping, if the ranks were asked to stop and nobody needs to end them.

    Args:
        ranks, shown: what is known of them.
    """
    seconds = seconds_to_stop(job, ranks, None if shown is None else shown.seconds_per_step)
    if seconds is None or group.exit_code is not None:
        return JobCancelled("cancelled")
    pool.stop(group, job, folder, seconds)
    return Stopping("cancelled")


def seconds_to_stop(job: GroupJob, ranks: Mapping[int, Seen], seconds_per_step: float | None) -> float | None:
    """How long a cancelled job's ranks may take to stop; None: they are to be ended at once.

    Args:
        ranks: what is known of them.
        seconds_per_step: None where no step is done.
    """
    parallel = job.parallel
    if parallel.keep_warm_seconds == 0 or parallel.more_follow or (seconds_per_step or 0) > MOST_SECONDS_PER_STEP:
        return None
    # What is loaded in part, or decoded in the end, has no place at which it could stop.
    working = [seen.phase in job.STOPS_IN and not (seen.stopped or seen.gone) for seen in ranks.values()]
    return SECONDS + (seconds_per_step or 0) if len(working) == parallel.gpu_count and all(working) else None


def stopped_ranks(group: WorkerGroup, job: GroupJob, folder: JobDir, seconds: float) -> list[Process] | None:
    """Waits for ranks that were asked to stop. Returns them; None if they have ended, or have not stopped in time."""
    signs, deadline = SignsOfLife(folder, job.parallel), time.monotonic() + seconds
    while time.monotonic() < deadline and not group.ended and group.exit_code is None:
        if signs.all_done():
            return [seen.process for _, seen in sorted(signs.ranks().items())]
        time.sleep(POLL)
    return None
