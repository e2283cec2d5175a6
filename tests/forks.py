"""Ranks forked from a process that has imported everything."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable


def fork_ranks(main: Callable[[int], int], world: int) -> list[int]:
    """Calls `main(rank)` in a process each, forked from this one. Returns their exit codes."""
    sys.stdout.flush()
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = main(rank)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                # Not sys.exit: what the parent would clean up at its end is not this process's.
                os._exit(code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
