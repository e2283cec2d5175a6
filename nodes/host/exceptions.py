"""How what happened to a job is told to ComfyUI."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...distributed.job.errors import JobCancelled
from ...distributed.launch.launcher import JobFailed
from . import host


@contextmanager
def told_to_comfyui() -> Iterator[None]:
    """Turns a cancel, and full memory, which ComfyUI has advice for, into ComfyUI's own exceptions."""
    try:
        yield
    except JobCancelled as error:
        raise host.interruption() from error
    except JobFailed as error:
        if error.out_of_memory:
            raise host.out_of_memory(str(error)) from error
        raise
