"""A listener on 127.0.0.1."""

from __future__ import annotations

import socket

from ..job.job import JobError


def listen(port: int) -> socket.socket:
    """Listens on 127.0.0.1:`port`. Raises JobError naming the port if that is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # A port that the last job used seconds ago, in TIME_WAIT, is free.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise JobError(
            f"master_port is {port}, and 127.0.0.1:{port} cannot be used ({error.strerror}). "
            "Choose another port, or 0 to need none"
        ) from error
    return listener
