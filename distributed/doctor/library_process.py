"""The doctor in a process of its own, for ComfyUI: nothing that it loads or that hangs stays."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..job.errors import JobCancelled, JobError
from ..machine import import_paths
from ..machine.processes import descendants, kill_all

PACK = Path(__file__).resolve().parent.parent
TIMEOUT = 600.0
"""Seconds, more than all of the doctor's own deadlines."""
POLL = 0.1


def run_doctor(
    *,
    model: Sequence[str],
    output: Path,
    temp: Path,
    folder: str,
    cancelled: Callable[[], bool],
    environment: Mapping[str, str] = os.environ,
) -> dict[str, Any]:
    """What `Report.data` gives.

    Args:
        model: the files of a transformer; empty for none.
        output: folder for videos.
        temp: folder in which jobs live.
        folder: the name of the pack's, as ComfyUI sees it.
        cancelled: asked every 0.1 s.
    Raises:
        JobCancelled: `cancelled` said so.
        JobError: the doctor ended without a report.
    """
    command = [sys.executable, "-u", str(PACK), "doctor", "--json", "--output", str(output), "--temp", str(temp)]
    command += ["--pack-folder", folder]
    command += ["--model", *model] if model else []
    # Killed, it cannot clean up: what it makes is made in here.
    with (
        tempfile.TemporaryDirectory(prefix="wan-doctor-", ignore_cleanup_errors=True) as scratch,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as errors,
    ):
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors,
            env={**environment, "TMPDIR": scratch, import_paths.VARIABLE: import_paths.handed_on(environment)},
            start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + TIMEOUT
            while process.poll() is None:
                if cancelled():
                    raise JobCancelled("cancelled while the doctor looked")
                if time.monotonic() >= deadline:
                    raise JobError(f"the doctor did not end within {TIMEOUT:g} s")
                time.sleep(POLL)
        finally:
            _end(process)
        out.seek(0)
        errors.seek(0)
        text, said = out.read().decode(errors="replace"), errors.read()[-2000:].decode(errors="replace").strip()
    try:
        return json.loads(text)
    except ValueError as error:
        raise JobError(f"the doctor ended with exit code {process.returncode} and no report:\n{said}") from error


def _end(process: subprocess.Popen[bytes]) -> None:
    below = descendants(process.pid) if sys.platform == "linux" and process.poll() is None else []
    process.kill()
    kill_all(lambda: below, 2.0)
    # One that waits inside a driver goes when the driver lets it.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(2.0)
