"""Which jobs can use each other's processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from ..job.job import GroupJob, Parallel

OF_PROCESSES = ("gpu_count", "gpu_ids", "hosts", "master_port")
"""Fields of `Parallel` that are decided when processes start. All others may differ from job to job of a group: ranks
change how they compute, and move or read again what `Parallel.weights_lie` tells apart."""
OF_TRANSFORMER = frozenset(
    {
        "use_ulysses", "use_fsdp", "offload_model", "stream_blocks", "memory_optimization", "linear_precision",
        "ulysses_engine", "gather", "quantised_loras", "exact_steps", "exact_blocks",
    }
)  # fmt: skip
"""Fields that say how a transformer lies and is computed: nothing to a job that has none."""


def without_weights(parallel: Parallel) -> Parallel:
    """The same where no transformer is: nothing is said of how one lies."""
    plain = Parallel(gpu_count=1)
    said: dict[str, Any] = {name: getattr(plain, name) for name in OF_TRANSFORMER}
    return dataclasses.replace(parallel, **said)


@dataclass(frozen=True, slots=True)
class GroupKind:
    """What a group of processes is for. It can do every job of an equal kind."""

    work: Hashable
    processes: tuple[object, ...]
    """What was decided when they started."""

    @classmethod
    def of(cls, job: GroupJob) -> GroupKind:
        """A group that was started for this job."""
        return cls(job.shared, tuple(getattr(job.parallel, name) for name in OF_PROCESSES))
