"""A file of which others see nothing until it is whole. Linux."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from ...distributed.machine.gpu_locks import try_lock

PREFIX = ".wan-draft-"
"""Of drafts on a file system that knows no files without a name."""


class Draft:
    """A context manager: write to `path`, then `publish`. Whenever this process is killed, the name is free or the file
    is whole; without `publish` nothing is left.

    The file has no name at first and is in its folder nevertheless, so that it gets that folder's group and rights, and
    its name in one step. On file systems that cannot do that (NFS, network shares) it is hidden; a kill leaves it, and
    the next draft in the folder removes it.

    Args:
        folder: where the file will be.
        scratch: a folder for the name by which the unnamed file is written; what is left there is not looked for.
        suffix: of that name, such as ".mp4": programs go by it.
    """

    def __init__(self, folder: Path, *, scratch: Path, suffix: str) -> None:
        self._folder, self._scratch, self._suffix = folder, scratch, suffix

    def __enter__(self) -> Draft:
        name = f"{PREFIX}{secrets.token_hex(8)}{self._suffix}"
        try:
            self._descriptor = os.open(self._folder, os.O_TMPFILE | os.O_RDWR, 0o666)
        except OSError:
            self._hidden, self.path = True, self._folder / name
            _remove_abandoned(self._folder)
            self._descriptor = _create_locked(self.path)
            return self
        self._hidden, self.path = False, self._scratch / name
        try:
            self.path.symlink_to(self._link)
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def publish(self, names: Iterable[str]) -> Path:
        """Gives it the first of the names that nobody has taken. Returns where it is."""
        for name in names:
            target = self._folder / name
            with contextlib.suppress(FileExistsError):
                self._name(target)
                return target
        raise FileExistsError(f"every name is taken in {self._folder}")

    @property
    def _link(self) -> str:
        return f"/proc/self/fd/{self._descriptor}"

    def _name(self, target: Path) -> None:
        """Raises FileExistsError if the name is taken."""
        if not self._hidden:
            # A folder's descriptor, which a whole path ignores, makes Python follow the link.
            os.link(self._link, target, src_dir_fd=self._descriptor, follow_symlinks=True)
            return
        try:
            os.link(self.path, target)
        except FileExistsError:
            raise
        except OSError:
            # No links either: only another program could take the name between these two lines.
            if target.exists():
                raise FileExistsError(target) from None
            os.rename(self.path, target)


def _create_locked(path: Path) -> int:
    """Opens a new file. As with job folders, the lock is how one is known whose process has died."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        try_lock(descriptor, wait=True)
        if path.exists():
            return descriptor
        # Another program's draft found it before it was locked, and removed it.
        os.close(descriptor)


def _remove_abandoned(folder: Path) -> None:
    for path in folder.glob(f"{PREFIX}*"):
        # For writing too: NFS locks no other file for one alone.
        with contextlib.suppress(OSError), path.open("r+b") as file:
            if try_lock(file):
                path.unlink()
