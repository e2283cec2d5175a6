"""Calls of a VAE from this process, computed by groups of processes."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..job.errors import JobError
from ..job.job import VaeJob
from ..job.job_folder import JobDir
from ..job.progress import Progress
from ..machine.host_memory import available_bytes
from ..machine.memory_file import MemoryFile, Populating
from .held import HeldGroup
from .launcher import run_job
from .pool import Pool
from .result import Result

if TYPE_CHECKING:
    from torch import Tensor

GIB = 2**30


class VaeCalls:
    """Runs each call as a job on a group of the pool. Not for several threads at once.

    Args:
        rest: has whatever else is at work on the pool's groups from this thread give them back.
        parent: where job folders live.
        failed: where the folders of failed jobs are kept.
        on_progress, on_log_line: called on the thread of the call; what they raise ends the job.
        cancelled: asked every 0.1 s.
    """

    def __init__(
        self, pool: Pool, rest: Callable[[], None], *, parent: Path, failed: Path,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        on_log_line: Callable[[str], None] = lambda line: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self._pool, self._rest, self._parent, self._failed = pool, rest, parent, failed
        self._on_progress, self._on_log_line, self._cancelled = on_progress, on_log_line, cancelled
        self._held: HeldGroup | None = None
        self.result: Result | None = None
        """Of the last call that went well; its folder is gone."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """The calls in it have one group, whatever its layout says of staying. It may stand in another one."""
        if self._held is not None:
            yield
            return
        self._rest()
        with closing(HeldGroup(self._pool)) as self._held:
            try:
                yield
            finally:
                self._held = None

    def moved(self, job: VaeJob) -> VaeJob | None:
        """As `Pool.moved`."""
        return self._pool.moved(job)

    def run(self, job: VaeJob, given: Tensor) -> Tensor:
        """What is made of `given`: float32 on the CPU, as `VaeJob.made` says. `together` is around it.

        Args:
            given: as `VaeJob.given` says.
        Raises:
            JobError: there is too little memory for both; JobFailed: the processes failed; JobCancelled.
        """
        import torch

        assert tuple(given.shape) == job.given and self._held is not None
        before, behind = job.memory
        _check_room(behind.stop)
        memory, whole, populating = MemoryFile("wan-pictures"), None, None
        mapped: mmap.mmap | None = None
        try:
            mapped = _mapped(memory, behind.stop)
            whole = torch.frombuffer(mapped, dtype=torch.uint8)
            whole[before].view(getattr(torch, job.given_dtype)).view(job.given).copy_(given.detach())
            # While the ranks compute what is written there: new pages take longer than the copy.
            populating = Populating(mapped, behind)

            def write(inputs: Path) -> None:
                folder = JobDir(inputs.parent)
                folder.write_json(folder.pictures, {"memory": str(memory.path)})

            self.result = run_job(
                job, write, parent=self._parent, failed=self._failed, pool=self._held, on_progress=self._on_progress,
                on_log_line=self._on_log_line, cancelled=self._cancelled,
            )  # fmt: skip
            self.result.remove()
            return whole[behind].view(torch.float32).view(job.made)
        finally:
            if populating is not None:
                populating.stop()
            # An error that is kept somewhere keeps this function's variables, but not the frames.
            whole = mapped = populating = None
            memory.close()


def _mapped(memory: MemoryFile, size: int) -> mmap.mmap:
    try:
        return memory.map(size)
    except OSError as error:
        raise JobError(f"there is no memory for {_gib(size)} of latents and frames: {error}") from error


def _check_room(needed: int) -> None:
    available = available_bytes()
    if available is not None and needed > available:
        raise JobError(
            f"latents and frames take {_gib(needed)} of memory, where {_gib(available)} are available; decode or "
            "encode fewer frames at a time"
        )


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
