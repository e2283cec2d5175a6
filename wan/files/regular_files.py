"""Opens files that may have become something else: a named pipe would block for ever, a device has no end."""

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
