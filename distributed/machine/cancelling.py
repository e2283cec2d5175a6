"""A cancel reaches what is waited for before a job has processes: other programs, files that are read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from ..job.errors import JobCancelled

_asked: ContextVar[Callable[[], bool]] = ContextVar("wan_cancelled", default=lambda: False)


@contextlib.contextmanager
def cancelled_by(cancelled: Callable[[], bool]) -> Iterator[None]:
    """What this thread waits for inside ends when `cancelled` says so."""
    # Not handed down from function to function: what asks nvidia-smi is many calls away from what knows of a cancel.
    token = _asked.set(cancelled)
    try:
        yield
    finally:
        _asked.reset(token)


def check_cancelled() -> None:
    """Raises JobCancelled once the job of this thread is cancelled."""
    if _asked.get()():
        raise JobCancelled("cancelled before the job started")
