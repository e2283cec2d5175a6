"""Runs the jobs of a batch: one thread per group of GPUs, each taking the next job as soon as it is free."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...distributed.job.errors import JobCancelled
from ...distributed.job.job import Job, JobError, Parallel
from ...distributed.job.progress import Progress
from ...distributed.launch.held import HeldGroup
from ...distributed.launch.launcher import run_job
from ...distributed.launch.pool import Pool
from ...distributed.launch.result import Result
from ..host import host
from ..inference.outcome import inputs_writer

POLL = 0.1


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """All groups together, as the node shows it."""

    fraction: float
    text: str
    previews: tuple[bytes, ...] = ()
    """JPEGs of what the videos at work are going to be, in the order of their groups, where one of them is new."""


@dataclass(frozen=True, slots=True)
class _Event:
    """What a group's thread has to say."""

    group: int
    video: int | None
    """None: of the thread itself, which is at its end."""
    what: Any
    """A Progress; or how the video ended, a Result or an exception; None."""


class BatchRun:
    """One batch.

    Args:
        jobs: with the tensors that travel with each, in order. Of one kind.
        groups: how each group of GPUs runs them, instead of the jobs' own `parallel`.
        room: of each, as `run_job` has it.
        on_result: called with a job's index, its group's and what it made, whose folder is the callee's to remove.
        on_failure: called with a job's index and why it made nothing.
        on_progress: told of every change.
        cancelled: asked every 0.1 s.
        All of these are called on the thread that calls `run`.
    """

    def __init__(
        self,
        jobs: Sequence[tuple[Job, dict[str, Any]]],
        groups: Sequence[Parallel],
        pool: Pool,
        *,
        on_result: Callable[[int, int, Result], None],
        on_failure: Callable[[int, Exception], None],
        on_progress: Callable[[BatchProgress], None],
        cancelled: Callable[[], bool],
        room: Mapping[Path, int] | None = None,
    ) -> None:
        self._jobs, self._groups, self._pool = jobs, groups, pool
        self._on_result, self._on_failure, self._on_progress = on_result, on_failure, on_progress
        self._cancelled, self._room = cancelled, room
        self._waiting = deque(range(len(jobs)))
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._running: dict[int, Progress] = {}
        self._previews: dict[int, bytes] = {}
        self._done = 0
        # Asked here: ComfyUI's folders are a matter of the thread that runs the node.
        self._parent, self._failed = host.jobs_folder(), host.failed_folder()

    def run(self) -> None:
        """Returns when every job has ended, well or not. No process of a job outlives an exception."""
        threads = [
            threading.Thread(target=self._work, args=(group,), name=f"wan-batch-{group}")
            for group in range(len(self._groups))
        ]
        for thread in threads:
            thread.start()
        try:
            left = len(threads)
            while left:
                if self._cancelled():
                    raise JobCancelled("cancelled")
                try:
                    event = self._events.get(timeout=POLL)
                except queue.Empty:
                    continue
                if event.video is None:
                    left -= 1
                    if event.what is not None:
                        raise event.what
                else:
                    self._take_in(event.group, event.video, event.what)
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
            # Made, but nobody will ask for it.
            while not self._events.empty():
                if isinstance(unclaimed := self._events.get().what, Result):
                    unclaimed.remove()

    def _take_in(self, group: int, video: int, what: Any) -> None:
        if isinstance(what, Progress):
            self._running[group] = what
            if what.preview is not None:
                self._previews[group] = what.preview
        else:
            self._running.pop(group, None)
            self._previews.pop(group, None)
            self._done += 1
            if isinstance(what, Exception):
                self._on_failure(video, what)
            else:
                self._on_result(video, group, what)
        progress = self._progress()
        if isinstance(what, Progress) and what.preview is not None:
            previews = tuple(preview for _, preview in sorted(self._previews.items()))
            progress = dataclasses.replace(progress, previews=previews)
        self._on_progress(progress)

    def _progress(self) -> BatchProgress:
        total = len(self._jobs)
        parts = [f"{self._done}/{total} done"]
        for group, progress in sorted(self._running.items()):
            # The rest of the time is this video's, not the batch's, and for more there is no room.
            brief = dataclasses.replace(progress, seconds_per_step=None, usage="")
            parts.append(f"{self._name(group)}: {brief.text}")
        fraction = (self._done + sum(progress.fraction for progress in self._running.values())) / total
        return BatchProgress(fraction, "; ".join(parts))

    def _name(self, group: int) -> str:
        ids = self._groups[group].gpu_ids
        return f"GPU {','.join(ids)}" if ids else f"group {group + 1}"

    def _work(self, group: int) -> None:
        """A group's thread."""
        ending: BaseException | None = None
        try:
            self._make_videos(group)
        except JobCancelled:
            assert self._stop.is_set()
        except BaseException as error:
            ending = error
        self._events.put(_Event(group, None, ending))

    def _make_videos(self, group: int) -> None:
        held = HeldGroup(self._pool)
        try:
            while not self._stop.is_set() and (video := self._next()) is not None:
                try:
                    what: Any = self._one(group, video, held)
                except JobCancelled:
                    raise
                except (JobError, ValueError, OSError) as error:
                    what = error
                self._events.put(_Event(group, video, what))
        finally:
            held.close()

    def _next(self) -> int | None:
        try:
            return self._waiting.popleft()
        except IndexError:
            return None

    def _one(self, group: int, video: int, held: HeldGroup) -> Result:
        job, tensors = self._jobs[video]
        return run_job(
            dataclasses.replace(job, parallel=self._groups[group]),
            inputs_writer(tensors),
            parent=self._parent,
            failed=self._failed,
            on_progress=lambda progress: self._events.put(_Event(group, video, progress)),
            on_log_line=lambda line: host.log(f"video {video + 1}: {line}"),
            cancelled=self._stop.is_set,
            pool=held,
            room=self._room,
        )
