"""Groups of processes that stay warm: each waits a while for the next job of its kind. Standard library only."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .gpu_locks import GpuLocks, wait_for_gpus
from .group import WorkerGroup
from .job import Job


@dataclass(slots=True)
class _Member:
    """A group that is alive, and what it is for."""

    group: WorkerGroup
    locks: GpuLocks
    kind: Any
    idle: bool = False
    released: bool = False
    """To end with its job."""
    timer: threading.Timer | None = None


def _kind(job: Job) -> tuple[Any, ...]:
    """Jobs of equal kinds can use each other's processes: same files, same GPUs, same layout of the weights."""
    parallel = dataclasses.replace(job.parallel, start_timeout=1.0, stall_timeout=1.0, keep_warm_seconds=0.0)
    model = dataclasses.replace(job.model, high_noise_loras=(), low_noise_loras=())
    return parallel, model


class Pool:
    """The groups of one process."""

    def __init__(self) -> None:
        self._members: list[_Member] = []
        self._lock = threading.RLock()

    def take(
        self, job: Job, parent: Path, *, cancelled: Callable[[], bool], on_wait: Callable[[str], None]
    ) -> WorkerGroup:
        """A group for the job: the idle one of its kind, or a new one.

        Idle groups of another kind that hold the job's GPUs (or memory, on a machine without one) are ended.

        Args:
            parent: where a new group's folder goes.
            cancelled: asked while another program holds a GPU; then JobCancelled is raised.
            on_wait: told what is waited for.
        """
        with self._lock:
            for member in [member for member in self._members if member.idle]:
                if member.kind == _kind(job) and member.group.usable:
                    member.idle = False
                    if member.timer is not None:
                        member.timer.cancel()
                    return member.group
                if not member.group.usable or _overlap(member.kind[0].gpu_ids, job.parallel.gpu_ids):
                    self._end(member)
        locks = wait_for_gpus(job.parallel.gpu_ids, cancelled=cancelled, on_wait=on_wait)
        try:
            group = WorkerGroup(job.parallel, parent)
        except BaseException:
            locks.release()
            raise
        with self._lock:
            self._members.append(_Member(group, locks, _kind(job)))
        return group

    def give_back(self, group: WorkerGroup, job: Job) -> None:
        """After a good job: the group waits for the next one as long as the job says, or ends."""
        with self._lock:
            member = self._member(group)
            seconds = job.parallel.keep_warm_seconds
            if seconds <= 0 or member.released:
                self._end(member)
                return
            member.idle = True
            member.timer = threading.Timer(seconds, self._expire, [member])
            member.timer.daemon = True
            member.timer.start()

    def forget(self, group: WorkerGroup) -> None:
        """After the group has ended: its GPUs are free for others."""
        with self._lock:
            member = self._member(group)
            self._members.remove(member)
            group.remove()
            member.locks.release()

    def release(self) -> int:
        """Ends every idle group; GPU memory is free when this returns. Busy ones end with their job.

        Returns:
            how many ended now.
        """
        with self._lock:
            idle = [member for member in self._members if member.idle]
            for member in self._members:
                member.released = True
            for member in idle:
                self._end(member)
            return len(idle)

    def _member(self, group: WorkerGroup) -> _Member:
        return next(member for member in self._members if member.group is group)

    def _expire(self, member: _Member) -> None:
        with self._lock:
            # Taken in the moment in which its time ran out.
            if member.idle and member in self._members:
                self._end(member)

    def _end(self, member: _Member) -> None:
        if member.timer is not None:
            member.timer.cancel()
        member.group.end()
        self.forget(member.group)


def _overlap(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    return not a or not b or bool(set(a) & set(b))
