"""Groups of processes that stay warm: each waits a while for the next job of its kind."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..group.worker_group import WorkerGroup
from ..hosts.hosts_group import HostsGroup
from ..job.errors import JobCancelled
from ..job.job import FileIdentity, GroupJob, J, Job, Parallel
from ..job.job_folder import JobDir
from ..machine.gpu_locks import GpuLocks, wait_for_gpus
from ..machine.gpus import Gpu, list_gpus
from ..machine.host_memory import available_bytes
from ..machine.processes import Process
from .group_kind import GroupKind
from .stopping import stopped_ranks

POLL = 0.1


@dataclass(slots=True)
class _Member:
    """A group that is alive, and what it is for."""

    group: WorkerGroup
    locks: GpuLocks
    kind: GroupKind
    parallel: Parallel
    """Of its last job."""
    transformer: tuple[FileIdentity, ...]
    """Of its last job that had one; of a VAE until then."""
    idle: bool = False
    released: bool = False
    """To end with its job."""
    stopping: threading.Thread | None = None
    """Waits for the ranks of a cancelled job to stop; afterwards it is idle, or has ended."""
    timer: threading.Timer | None = None
    expires: float = 0.0
    """By `time.monotonic()`; of an idle one."""
    free_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    """Of its GPUs before it started, by index."""
    host_bytes: int | None = None
    """Of the host's memory that were available before it started."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupView:
    """A group as the user is shown it."""

    id: str
    transformer: tuple[FileIdentity, ...]
    """The model's files, or of one of its experts: of its last job that had one. A VAE's until then."""
    parallel: Parallel
    idle: bool
    """It waits for a job."""
    released: bool
    """It ends with its job."""
    seconds_left: float | None
    """Until an idle one ends."""
    job: JobDir | None
    """Of its last job; gone once that is done."""
    ranks: tuple[Process, ...]
    """Empty during its first job."""


class Pool:
    """The groups of one process."""

    def __init__(self) -> None:
        self._members: list[_Member] = []
        self._lock = threading.RLock()

    def take(
        self, job: GroupJob, parent: Path, *, cancelled: Callable[[], bool], on_wait: Callable[[str], None]
    ) -> WorkerGroup:
        """A group for the job: the idle one of its kind, or a new one.

        Idle groups of another kind that hold the job's GPUs (or memory, on a machine without one) are ended.

        Args:
            parent: where a new group's folder goes.
            cancelled: asked while another program holds a GPU; then JobCancelled is raised.
            on_wait: told what is waited for.
        """
        before: dict[str, int] = {}
        host_bytes = self.host_bytes()
        kind = GroupKind.of(job)
        self._wait_for_stopping(kind, cancelled, on_wait)
        with self._lock:
            for member in self._resting():
                if member.idle and member.kind == kind and member.group.usable:
                    member.idle = False
                    member.parallel, member.transformer = job.parallel, job.transformer or member.transformer
                    if member.timer is not None:
                        member.timer.cancel()
                    return member.group
                if not member.group.usable or _overlap(member.parallel.gpu_ids, job.parallel.gpu_ids):
                    before |= member.free_bytes
                    self._end(member)
        # Over several machines each machine's agent waits for its own.
        own_gpus = () if job.parallel.hosts else job.parallel.gpu_ids
        locks = wait_for_gpus(own_gpus, cancelled=cancelled, on_wait=on_wait)
        # The driver may need a moment to give back what an ended group held.
        own = [gpu for gpu in list_gpus() if gpu.index in own_gpus] if own_gpus else []
        free = {gpu.index: max(gpu.free_bytes, before.get(gpu.index, 0)) for gpu in own}
        try:
            group = (
                HostsGroup(job, parent)
                if isinstance(job, Job) and job.parallel.hosts
                else WorkerGroup(job.parallel, parent)
            )
        except BaseException:
            locks.release()
            raise
        with self._lock:
            known_by = job.transformer or job.files
            self._members.append(
                _Member(group, locks, kind, job.parallel, known_by, free_bytes=free, host_bytes=host_bytes)
            )
        return group

    def moved(self, job: J) -> J | None:
        """The job on the GPUs of the group without a job that could do it there, the last one; None: there is none."""
        with self._lock:
            for member in reversed(self._resting()):
                there = dataclasses.replace(
                    job.parallel, gpu_count=member.parallel.gpu_count, gpu_ids=member.parallel.gpu_ids
                )
                moved = dataclasses.replace(job, parallel=there)
                if member.kind == GroupKind.of(moved):
                    return moved
        return None

    def give_back(self, group: WorkerGroup, job: GroupJob) -> None:
        """After a good job: the group waits for the next one as long as the job says, or ends."""
        with self._lock:
            member = self._member(group)
            seconds = job.parallel.keep_warm_seconds
            if seconds > 0 and not member.released:
                member.idle = True
                member.expires = time.monotonic() + seconds
                member.timer = threading.Timer(seconds, self._expire, [member])
                member.timer.daemon = True
                member.timer.start()
                return
        # Not under the lock: nobody else touches a group that is not idle, and those of a batch end side by side.
        self._end(member)

    def stop(self, group: WorkerGroup, job: GroupJob, folder: JobDir, seconds: float) -> None:
        """After a cancel: asks the group's ranks to stop after their step. Returns at once.

        Once they have stopped the group waits as after a good job; if they have not within `seconds`, it is ended. The
        job's folder is removed then.
        """
        with self._lock:
            member = self._member(group)
            member.stopping = threading.Thread(
                target=self._see_it_stop, args=(member, job, folder, seconds), name="wan-stop", daemon=True
            )
            folder.write_json(folder.stop, {})
            member.stopping.start()

    def _see_it_stop(self, member: _Member, job: GroupJob, folder: JobDir, seconds: float) -> None:
        ranks = stopped_ranks(member.group, job, folder, seconds)
        with self._lock:
            # Otherwise it was ended meanwhile.
            if member in self._members:
                member.stopping = None
                if ranks is None:
                    self._end(member)
                else:
                    member.group.ranks = ranks
                    self.give_back(member.group, job)
        folder.remove()

    def _wait_for_stopping(
        self, kind: GroupKind, cancelled: Callable[[], bool], on_wait: Callable[[str], None]
    ) -> None:
        """Until no group that could do such a job is about to stop. Raises JobCancelled."""
        with self._lock:
            threads = [each.stopping for each in self._members if each.stopping and each.kind == kind]
        if threads:
            on_wait("waiting for the end of the step that was cancelled")
        for thread in threads:
            while thread.is_alive():
                thread.join(POLL)
                if cancelled():
                    raise JobCancelled("cancelled")

    def _resting(self) -> list[_Member]:
        """Those without a job: idle, or about to be."""
        return [member for member in self._members if member.idle or member.stopping is not None]

    def forget(self, group: WorkerGroup) -> None:
        """After the group has ended: its GPUs are free for others."""
        with self._lock:
            member = self._member(group)
            self._members.remove(member)
            group.remove()
            member.locks.release()

    def release(self, group_id: str | None = None) -> int:
        """Ends every idle group; GPU memory is free when this returns. Busy ones end with their job.

        Args:
            group_id: `GroupView.id` of the only one that is meant; one that has ended meanwhile is fine.
        Returns:
            how many ended now.
        """
        with self._lock:
            meant = [member for member in self._members if group_id in (None, _id(member))]
            idle = [member for member in self._resting() if member in meant]
            for member in meant:
                member.released = True
            for member in idle:
                self._end(member)
            return len(idle)

    def without_idle(self, gpus: list[Gpu]) -> list[Gpu]:
        """The GPUs with the free memory that they have once the idle groups on them have ended.

        What others have taken since a group started is not seen.
        """
        with self._lock:
            idle = self._resting()
            before = {index: free for member in idle for index, free in member.free_bytes.items()}
        return [dataclasses.replace(gpu, free_bytes=max(gpu.free_bytes, before.get(gpu.index, 0))) for gpu in gpus]

    def host_bytes(self) -> int | None:
        """The host's memory that is available once the idle groups have ended; None if the system does not tell.

        Those on GPUs that the next job leaves alone count as well.
        """
        with self._lock:
            before = [member.host_bytes for member in self._resting()]
        return max((size for size in (available_bytes(), *before) if size is not None), default=None)

    def view(self) -> list[GroupView]:
        """The groups that are alive, in the order in which they started."""
        now = time.monotonic()
        with self._lock:
            return [
                GroupView(
                    id=_id(member), parallel=member.parallel, transformer=member.transformer, idle=member.idle,
                    released=member.released, seconds_left=max(0.0, member.expires - now) if member.idle else None,
                    job=member.group.job, ranks=tuple(member.group.ranks),
                )
                for member in self._members
            ]  # fmt: skip

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


def _id(member: _Member) -> str:
    return member.group.folder.path.name


def _overlap(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    return not a or not b or bool(set(a) & set(b))
