"""Where a running job gets its group of processes from, and who gets it afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ..group.worker_group import WorkerGroup
from ..job.job import GroupJob
from ..job.job_folder import JobDir


class GroupSource(Protocol):
    """A pool of groups, or one of them that its caller keeps to itself. What is taken is given back, stopped or
    forgotten."""

    def take(
        self, job: GroupJob, parent: Path, *, cancelled: Callable[[], bool], on_wait: Callable[[str], None]
    ) -> WorkerGroup:
        """A group for the job.

        Args:
            parent: where a new group's folder goes.
            cancelled: asked while another program holds a GPU; then JobCancelled is raised.
            on_wait: told what is waited for.
        """

    def give_back(self, group: WorkerGroup, job: GroupJob) -> None:
        """After a good job."""

    def stop(self, group: WorkerGroup, job: GroupJob, folder: JobDir, seconds: float) -> None:
        """After a cancel: asks the ranks to stop after their step, and ends them after `seconds`. Returns at once; the
        job's folder is removed when they have stopped."""

    def forget(self, group: WorkerGroup) -> None:
        """After the group has ended: its GPUs are free for others."""
