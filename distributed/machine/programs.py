"""Asks other programs, such as nvidia-smi, and waits no longer than is said."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .cancelling import check_cancelled

END_SECONDS = 1.0
"""In which a killed program is gone, unless it waits inside a driver: there nothing ends it."""
POLL = 0.1


def ask_program(
    command: Sequence[str],
    *,
    timeout: float,
    given: bytes = b"",
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Runs a program to its end.

    Args:
        timeout: seconds.
        given: to its standard input.
        environment, folder: in which it runs; None for this process's.
    Raises:
        OSError: it cannot be started.
        subprocess.TimeoutExpired: it did not end in time, and was killed.
        JobCancelled: meanwhile, and it was killed; asked for every 0.1 s (cancelling.py).
    """
    # Not subprocess.run, which waits for a program that it has killed, however long that takes.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=folder
    )
    try:
        out, errors = _communicate(process, given, timeout)
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


def _communicate(process: subprocess.Popen[bytes], given: bytes, timeout: float) -> tuple[bytes, bytes]:
    deadline = time.monotonic() + timeout
    sent: bytes | None = given
    while True:
        left = deadline - time.monotonic()
        try:
            return process.communicate(sent or None, max(0.0, min(POLL, left)))
        except subprocess.TimeoutExpired:
            # Once: it goes on with what it has not written yet.
            sent = None
            if left <= POLL:
                raise subprocess.TimeoutExpired(process.args, timeout) from None
            check_cancelled()
