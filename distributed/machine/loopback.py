"""Listeners on one address of this machine."""

from __future__ import annotations

import socket

from ..job.job import JobError


def listen(port: int) -> socket.socket:
    """Listens on 127.0.0.1:`port`. Raises JobError naming the port if that is taken."""
    try:
        return listen_at("127.0.0.1", port)
    except OSError as error:
        raise JobError(
            f"master_port is {port}, and 127.0.0.1:{port} cannot be used ({error.strerror}). "
            "Choose another port, or 0 to need none"
        ) from error


def listen_at(address: str, port: int) -> socket.socket:
    """Listens there. Raises OSError."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    # A port that the last job used seconds ago, in TIME_WAIT, is free.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener
