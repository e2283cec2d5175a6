"""Asks nvidia-smi, which makes no CUDA context."""

from __future__ import annotations

import subprocess

from .programs import ask_program

TIMEOUT = 10.0
"""Seconds that it gets for an answer."""
FAILURES = (OSError, subprocess.SubprocessError)
"""What `ask` raises where nvidia-smi is missing, fails or takes too long."""


def ask(*options: str, timeout: float | None = None) -> str:
    """What it prints. Raises one of FAILURES.

    Args:
        timeout: seconds; None for TIMEOUT.
    """
    answer = ask_program(["nvidia-smi", *options], timeout=TIMEOUT if timeout is None else timeout)
    said, errors = (text.decode(errors="replace") for text in (answer.stdout, answer.stderr))
    if answer.returncode:
        raise subprocess.CalledProcessError(answer.returncode, answer.args, said, errors)
    return said


def query(what: str, *fields: str, timeout: float | None = None) -> list[list[str]]:
    """One line of values for each GPU, or whatever is asked about. Raises one of FAILURES.

    Args:
        what: "gpu", "compute-apps": as in nvidia-smi's options `--query-...`.
        fields: their names; memory is in MiB, and a value that it does not know is no number.
        timeout: as of `ask`.
    Returns:
        the values of each line. A line without values (an error's text), or a name with a comma, has another length.
    """
    printed = ask(f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits", timeout=timeout)
    return [[value.strip() for value in line.split(",")] for line in printed.splitlines()]
