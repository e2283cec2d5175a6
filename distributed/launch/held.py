"""A group of processes that one caller keeps to itself from job to job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..group.worker_group import WorkerGroup
from ..job.job import GroupJob
from ..job.job_folder import JobDir
from .group_source import GroupSource


class HeldGroup:
    """In the place of a pool for `run_job`: its first job takes a group from the pool, the next ones run on the same.

    Its jobs must be of one kind; `more_follow` tells the ranks of all but a lone one to stay.
    """

    def __init__(self, pool: GroupSource) -> None:
        self._pool = pool
        self._group: WorkerGroup | None = None
        self._last: GroupJob | None = None

    def take(
        self, job: GroupJob, parent: Path, *, cancelled: Callable[[], bool], on_wait: Callable[[str], None]
    ) -> WorkerGroup:
        """As Pool.take. A group that died while it waited is replaced."""
        if self._group is not None and not self._group.usable:
            self._group.end()
            self.forget(self._group)
        if self._group is None:
            self._group = self._pool.take(job, parent, cancelled=cancelled, on_wait=on_wait)
        return self._group

    def give_back(self, group: WorkerGroup, job: GroupJob) -> None:
        """After a good job."""
        assert group is self._group
        self._last = job

    def stop(self, group: WorkerGroup, job: GroupJob, folder: JobDir, seconds: float) -> None:
        """As Pool.stop: after a cancel there is no next job, and the pool has the group."""
        assert group is self._group
        self._group = self._last = None
        self._pool.stop(group, job, folder, seconds)

    def forget(self, group: WorkerGroup) -> None:
        """After the group has ended."""
        assert group is self._group
        self._group = self._last = None
        self._pool.forget(group)

    def close(self) -> None:
        """Lets the pool have the group: it waits for other jobs as long as its last one says, or ends."""
        if self._group is None:
            return
        group, job = self._group, self._last
        assert job is not None, "run_job gives back or forgets what it took"
        self._group = self._last = None
        self._pool.give_back(group, job)
