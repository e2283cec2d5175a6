"""Evaluations for samplers in this process, computed by groups of processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..job.evaluator import SampleConditioning
from ..job.job import ForwardsJob
from ..job.progress import Progress
from .group_source import GroupSource
from .launcher import new_job_id, run_job
from .result import Result
from .served_job import ServedJob

if TYPE_CHECKING:
    from torch import Tensor


class GroupEvaluators:
    """Gives each sampling a job on a group of the pool. Not for several threads at once.

    A sampling that runs inside of another one's step has the GPUs meanwhile: the other one's job ends, and a new one
    begins with its next evaluation, on the same processes where they stay warm.

    Args:
        parent: where job folders live.
        failed: where the folders of failed jobs are kept.
        on_progress, on_log_line: called on a thread of their own; what they raise ends the job.
        cancelled: asked every 0.1 s, on that thread, between a sampling's first evaluation and its end.
    """

    def __init__(
        self, pool: GroupSource, *, parent: Path, failed: Path,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        on_log_line: Callable[[str], None] = lambda line: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self._pool, self._parent, self._failed = pool, parent, failed
        self._on_progress, self._on_log_line, self._cancelled = on_progress, on_log_line, cancelled
        self._at_work: GroupEvaluator | None = None

    def open(self, job: ForwardsJob) -> GroupEvaluator:
        """For one sampling. Its processes start with the first evaluation."""
        return GroupEvaluator(job, self)

    def serve(self, job: ForwardsJob, evaluator: GroupEvaluator) -> ServedJob:
        """Starts the job, once another sampling's has ended."""
        self.rest()
        self._at_work = evaluator

        def run(write: Callable[[Path], None], cancelled: Callable[[], bool]) -> Result:
            return run_job(
                job, write, parent=self._parent, failed=self._failed, pool=self._pool, on_progress=self._on_progress,
                on_log_line=self._on_log_line, cancelled=lambda: cancelled() or self._cancelled(),
            )  # fmt: skip

        return ServedJob(run)

    def rest(self) -> None:
        """The sampling that is at work, if one is, has other processes from its next evaluation on, or these again."""
        if self._at_work is not None:
            self._at_work.rest()

    def rests(self, evaluator: GroupEvaluator) -> None:
        """Its job has ended."""
        if self._at_work is evaluator:
            self._at_work = None


class GroupEvaluator:
    """One sampling."""

    def __init__(self, job: ForwardsJob, source: GroupEvaluators) -> None:
        self._job, self._source = job, source
        self._served: ServedJob | None = None
        self.result: Result | None = None
        """Of its last job, when that has ended well; its folder is gone."""

    def evaluate(self, x: Tensor, timesteps: Tensor, samples: Sequence[SampleConditioning]) -> Tensor:
        """As `Evaluator.evaluate`. Raises ValueError for what no model takes."""
        if self._served is None:
            self._served = self._source.serve(dataclasses.replace(self._job, id=new_job_id()), self)
        return self._served.evaluate(x, timesteps, samples)

    def rest(self) -> None:
        """Ends its job; another one begins with the next evaluation."""
        if self._served is None:
            return
        self._source.rests(self)
        served, self._served = self._served, None
        served.close()
        self.result = served.result

    def close(self) -> None:
        """As `Evaluator.close`. A second call does nothing."""
        self.rest()
