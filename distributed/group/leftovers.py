"""Job folders that outlive their job: failed ones are kept a while, abandoned ones removed."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

from ..job.job_folder import PREFIX, JobDir, OwnedFolder
from ..machine.gpu_locks import try_lock
from .group_folder import GROUP_PREFIX

KEPT = 5
"""Failed jobs."""
GRACE_SECONDS = 60
"""Age below which a folder without an owner may just be being made."""


def claim(folder: OwnedFolder) -> None:
    """Makes the folder this process's, until the process ends or removes it."""
    # A lock, not a pid: the kernel lets go of it however its holder dies, and two containers that share this folder
    # do not see each other's pids.
    unseen = folder.path / f".{folder.owner.name}"
    folder.lock = os.fdopen(os.open(unseen, os.O_WRONLY | os.O_CREAT, 0o600), "wb")
    # Before it has the name that others look for: who finds it not locked yet takes the folder for an abandoned one.
    try_lock(folder.lock)
    unseen.rename(folder.owner)


def remove_abandoned(parent: Path) -> None:
    """Removes the folders of jobs and groups whose launcher is gone: a ComfyUI that was killed cannot."""
    for path in (*parent.glob(f"{PREFIX}*"), *parent.glob(f"{GROUP_PREFIX}*")):
        with contextlib.suppress(OSError):
            if not _owned(JobDir(path)):
                shutil.rmtree(path, ignore_errors=True)


def keep_failed(folder: JobDir, failed: Path) -> Path:
    """Moves a failed job's folder to where a restart does not wipe it; only the newest stay. Returns its place."""
    try:
        # Frames are large, and asked for by nobody: they are decoded again. A pipe cannot move to another disk.
        for left in (*folder.path.glob(f"*{folder.frames.name}*"), *folder.path.glob("*bell*")):
            left.unlink()
        failed.mkdir(parents=True, exist_ok=True)
        kept = Path(shutil.move(folder.path, failed / f"{time.strftime('%Y%m%d-%H%M%S')}-{folder.path.name}"))
        os.utime(kept)
    except OSError:
        # Where it is, but by a name that `remove_abandoned` leaves alone.
        with contextlib.suppress(OSError):
            return folder.path.rename(folder.path.with_name(f"kept-{folder.path.name}"))
        return folder.path
    finally:
        if folder.lock is not None:
            folder.lock.close()
    older = sorted((path for path in failed.iterdir() if PREFIX in path.name), key=_age)
    for path in older[KEPT:]:
        shutil.rmtree(path, ignore_errors=True)
    return kept


def _owned(folder: JobDir) -> bool:
    try:
        # For writing too: NFS locks no other file for one alone, which would look like a lock that somebody holds.
        with folder.owner.open("r+b") as file:
            return not try_lock(file)
    except FileNotFoundError:
        return _age(folder.path) < GRACE_SECONDS


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0
