"""Job folders that outlive their job: failed ones are kept a while, abandoned ones removed. Standard library only."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from .job import JobError
from .jobdir import PREFIX, JobDir
from .processes import Process

KEPT = 5
"""Failed jobs."""
GRACE_SECONDS = 60
"""Age below which a folder without an owner may just be being made."""


def claim(folder: JobDir) -> None:
    """Marks the folder as this process's."""
    own = Process.of(os.getpid())
    assert own is not None
    folder.write_json(folder.owner, {"pid": own.pid, "started": own.started})


def remove_abandoned(parent: Path) -> None:
    """Removes the folders of jobs whose launcher is gone: a ComfyUI that was killed cannot."""
    for path in parent.glob(f"{PREFIX}*"):
        folder = JobDir(path)
        try:
            owner = folder.read_json(folder.owner)
            abandoned = not Process(int(owner["pid"]), int(owner["started"])).alive()
        except (JobError, LookupError, TypeError, ValueError):
            abandoned = _age(path) > GRACE_SECONDS
        if abandoned:
            shutil.rmtree(path, ignore_errors=True)


def keep_failed(folder: JobDir, failed: Path) -> Path:
    """Moves a failed job's folder to where a restart does not wipe it; only the newest stay. Returns its place."""
    try:
        failed.mkdir(parents=True, exist_ok=True)
        kept = Path(shutil.move(folder.path, failed / f"{time.strftime('%Y%m%d-%H%M%S')}-{folder.path.name}"))
        os.utime(kept)
    except OSError:
        return folder.path
    older = sorted((path for path in failed.iterdir() if PREFIX in path.name), key=_age)
    for path in older[KEPT:]:
        shutil.rmtree(path, ignore_errors=True)
    return kept


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0
