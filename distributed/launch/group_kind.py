"""Which jobs can use each other's processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from ..job.job import GroupJob, Parallel

OF_ONE_JOB = frozenset({"start_timeout", "stall_timeout", "keep_warm_seconds", "more_follow", "cfg_parallel"})
"""Fields of `Parallel` that may differ from job to job of a group; which ranks work on which prompt is one of them, as
the weights lie the same either way."""
OF_WEIGHTS = frozenset(
    {
        "use_ulysses", "use_fsdp", "offload_model", "stream_blocks", "memory_optimization", "linear_precision",
        "ulysses_engine", "gather", "quantised_loras",
    }
)  # fmt: skip
"""Fields that say how a transformer lies and is computed: nothing to processes that hold none."""


def without_weights(parallel: Parallel) -> Parallel:
    """The same where no transformer is: nothing is said of how one lies."""
    plain = Parallel(gpu_count=1)
    said: dict[str, Any] = {name: getattr(plain, name) for name in OF_WEIGHTS}
    return dataclasses.replace(parallel, **said)


@dataclass(frozen=True, slots=True)
class GroupKind:
    """What a group of processes is for."""

    work: Hashable
    processes: tuple[object, ...]
    """What was decided when they started."""
    weights: tuple[object, ...] | None
    """How their transformers lie; None: they hold none."""

    @classmethod
    def of(cls, job: GroupJob) -> GroupKind:
        """A group that was started for this job."""
        names = [field.name for field in dataclasses.fields(Parallel) if field.name not in OF_ONE_JOB]
        processes = tuple(getattr(job.parallel, name) for name in names if name not in OF_WEIGHTS)
        weights = tuple(getattr(job.parallel, name) for name in names if name in OF_WEIGHTS)
        return cls(job.shared, processes, weights if job.transformer else None)

    def serves(self, other: GroupKind) -> bool:
        """Whether such a group can do a job of the other kind: same work, same GPUs, same layout of the weights."""
        same = (self.work, self.processes) == (other.work, other.processes)
        return same and (None in (self.weights, other.weights) or self.weights == other.weights)

    def after(self, other: GroupKind) -> GroupKind:
        """Of the same group, when it has done a job of the other kind."""
        return dataclasses.replace(self, weights=self.weights or other.weights)
