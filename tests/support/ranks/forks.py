"""Ranks forked from a process that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from mount import SUPPORT, SUPPORT_ROOMS

TIMEOUT = 600.0
"""Seconds for all ranks together."""


def fork_ranks(main: Callable[[int], int | None], world: int, *, log: Path | None = None) -> list[int]:
    """Calls `main(rank)` in a process each. Returns their exit codes: what `main` returned, and 1 for an exception.

    The process that they are forked from is one for all calls, and ends with this one. Ranks that are late are killed.

    Args:
        main: can be pickled, as a function of a module can, or a functools.partial of one.
        log: where all of them print; None for where the first call's process prints.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank_imports"])
    ranks = [context.Process(target=_rank, args=(main, rank, log)) for rank in range(world)]
    deadline = time.monotonic() + TIMEOUT
    try:
        # Python 3.11's server does not hear of this process's sys.path, and passes over what it cannot import.
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(SUPPORT), *SUPPORT_ROOMS])):
            for process in ranks:
                process.start()
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for process in ranks:
            if process.pid is not None:
                process.kill()
                process.join()
    return [process.exitcode for process in ranks]


def _rank(main: Callable[[int], int | None], rank: int, log: Path | None) -> None:
    if log is not None:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
    raise SystemExit(main(rank))
