"""A rank's log: everything it and its libraries print goes to one file."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

FORMAT = "%(asctime)s rank {rank} %(phase)-7s | %(message)s"
"""Of every line, the pack's own and libraries'."""


def redirect_to(path: Path) -> None:
    """Sends file descriptors 1 and 2, so C libraries and children too, to the end of `path`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def set_up_logging(rank: int, phase: Callable[[], str], *, verbose: bool) -> None:
    """This pack's lines at INFO (DEBUG if `verbose`), libraries' from WARNING on.

    Args:
        phase: where the rank is now.
    """
    logging.basicConfig(
        stream=sys.stdout, format=FORMAT.format(rank=rank), datefmt="%H:%M:%S", level=logging.WARNING, force=True
    )

    def add_phase(record: logging.LogRecord) -> bool:
        record.phase = phase()
        return True

    # On the handler: a filter of a logger does not see what its children log.
    logging.getLogger().handlers[0].addFilter(add_phase)
    logging.getLogger(__package__.partition(".")[0]).setLevel(logging.DEBUG if verbose else logging.INFO)
