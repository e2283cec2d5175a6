"""One lock per GPU, so that two programs that use this pack do not run on the same one."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from ..job.errors import JobCancelled, JobError

POLL = 0.1


class GpuLocks:
    """Locks that are held; the kernel lets go of them however their holder dies."""

    def __init__(self, files: Sequence[IO[str]]) -> None:
        self._files = list(files)

    def release(self) -> None:
        for file in self._files:
            # A name stays only of who was killed.
            file.truncate(0)
            file.close()
        self._files.clear()


def wait_for_gpus(
    gpu_ids: Sequence[str],
    *,
    cancelled: Callable[[], bool],
    on_wait: Callable[[str], None],
    folder: Path | None = None,
) -> GpuLocks:
    """Takes the GPUs, once whoever has one of them lets it go. Nothing to wait for without GPUs.

    Args:
        gpu_ids: as in CUDA_VISIBLE_DEVICES.
        on_wait: told who holds what, whenever that changes.
    Raises:
        JobCancelled: `cancelled` said so meanwhile.
    """
    told = ""
    while True:
        locks, busy = _try_all(gpu_ids, _folder() if folder is None and gpu_ids else folder)
        if locks is not None:
            return locks
        if busy != told:
            on_wait(busy)
            told = busy
        if cancelled():
            raise JobCancelled("cancelled while waiting for a GPU")
        time.sleep(POLL)


def holder(gpu_id: str, folder: Path | None = None) -> str:
    """Which other program has the GPU, such as "process 123"; empty if none has."""
    # Nowhere else do jobs run, or locks like these exist.
    if sys.platform != "linux":
        return ""
    with _open(_place(gpu_id, _folder() if folder is None else folder)) as file:
        owner = _name(file)
        # Who finds a lock takes the GPU for one in use: a look must not be one to others that look, nor, where nobody
        # was killed with the GPU, to one that takes it.
        if not owner or try_lock(file, shared=True):
            return ""
    return "" if owner == _own_name() else owner


def _try_all(gpu_ids: Sequence[str], folder: Path | None) -> tuple[GpuLocks | None, str]:
    held: list[IO[str]] = []
    # In one order for everybody: two programs that want the same GPUs must not each hold half of them.
    for gpu in sorted(gpu_ids):
        assert folder is not None
        file = _open(_place(gpu, folder))
        if not try_lock(file):
            owner = _owner(file)
            file.close()
            GpuLocks(held).release()
            return None, f"waiting for GPU {gpu}, in use by {owner}"
        file.seek(0)
        file.truncate()
        file.write(_own_name())
        file.flush()
        held.append(file)
    return GpuLocks(held), ""


def _place(gpu_id: str, folder: Path) -> Path:
    return folder / f"gpu-{''.join(c if c.isalnum() or c == '-' else '_' for c in gpu_id)}.lock"


def _owner(file: IO[str]) -> str:
    return _name(file) or "another program"


def _name(file: IO[str]) -> str:
    return file.read(200).strip()


def _own_name() -> str:
    return f"process {os.getpid()}"


def _folder() -> Path:
    """For every user of this machine: GPUs are shared by all of them."""
    folder = Path("/tmp/wan-distributed-gpus")
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
        folder.chmod(0o1777)
    return folder


def _open(path: Path) -> IO[str]:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with contextlib.suppress(FileExistsError):
            created = os.open(path, flags | os.O_CREAT | os.O_EXCL)
            # Whatever the umask: the GPU's next user may be another one.
            os.fchmod(created, 0o666)
            os.close(created)
        # Without O_CREAT, which a sticky folder refuses for a file of another user (fs.protected_regular).
        descriptor = os.open(path, flags)
    except OSError as error:
        raise JobError(f"the GPU's lock {path} cannot be opened: {error.strerror}; remove it") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise JobError(f"the GPU's lock {path} is not a file; remove it")
    return os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace")


def try_lock(file: IO[str] | IO[bytes] | int, *, wait: bool = False, shared: bool = False) -> bool:
    """Of any file. False if somebody holds the lock (for whom it can `wait`), or the file system knows no locks.

    Args:
        file: open for writing, unless `shared`: NFS asks for that.
        shared: only against who holds it alone: others may look at the same time.
    """
    import fcntl  # Not on Windows, where ComfyUI must still be able to import this file.

    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
