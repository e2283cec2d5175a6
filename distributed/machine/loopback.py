"""Listeners on one address of this machine."""

from __future__ import annotations

import socket

from ..job.job import JobError

LOOPBACK = "127.0.0.1"


def listen(port: int, address: str = LOOPBACK) -> socket.socket:
    """Listens on `address`, at `port` or, if that is 0, at any free one. Raises JobError if that is taken."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    # A port that the last job used seconds ago, in TIME_WAIT, is free.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise JobError(
            f"master_port is {port}, and {address}:{port} cannot be used ({error.strerror}). "
            "Choose another port, or 0 to need none"
        ) from error
    return listener
