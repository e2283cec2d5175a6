"""Asks other programs, such as nvidia-smi, and waits no longer than is said. Standard library only."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Sequence

END_SECONDS = 1.0
"""In which a killed program is gone, unless it waits inside a driver: there nothing ends it."""


def ask_program(command: Sequence[str], *, timeout: float, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Runs a program to its end.

    Args:
        timeout: seconds.
        given: to its standard input.
    Raises:
        OSError: it cannot be started.
        subprocess.TimeoutExpired: it did not end in time, and was killed.
    """
    # Not subprocess.run, which waits for a program that it has killed, however long that takes.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, errors = process.communicate(given, timeout)
    except BaseException:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, errors)
