"""Opens files that may have become something else (a pipe would block for ever), and reads ranges of their bytes."""

from __future__ import annotations

import errno
import os
import stat


def regular(path: str, flags: int) -> int:
    """For `open(..., opener=regular)`. Raises OSError at once if `path` is not a regular file."""
    # Without effect on regular files; Windows has no such flag, and no named pipes among files.
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_range(descriptor: int, out: memoryview, offset: int, path: str) -> None:
    """Fills `out`, bytes, from `offset` on. Raises OSError if the file has ended before."""
    done = 0
    while done < len(out):
        count = os.preadv(descriptor, [out[done:]], offset + done)
        if count == 0:
            raise OSError(f"{path} ended at byte {offset + done}, {len(out) - done} bytes early")
        done += count
