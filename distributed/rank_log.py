"""A rank's log: everything it and its libraries print goes to one file."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

FORMAT = "%(asctime)s rank {rank} | %(message)s"


def redirect_to(path: Path) -> None:
    """Sends file descriptors 1 and 2, so C libraries and children too, to the end of `path`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def set_up_logging(rank: int, *, verbose: bool) -> None:
    """This pack's lines at INFO (DEBUG if `verbose`), libraries' from WARNING on."""
    logging.basicConfig(
        stream=sys.stdout, format=FORMAT.format(rank=rank), datefmt="%H:%M:%S", level=logging.WARNING, force=True
    )
    logging.getLogger(__package__.partition(".")[0]).setLevel(logging.DEBUG if verbose else logging.INFO)
