"""How the processes of several machines meet: torch's TCPStore, on the one interface that leads to the others."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ..job.errors import JobError
from ..job.json_files import read_json, write_json
from ..machine.loopback import LOOPBACK, listen

if TYPE_CHECKING:
    from torch.distributed import TCPStore

ADDRESS_VARIABLE = "WAN_HOST_ADDRESS"
"""Environment variable with this machine's address toward the others; not set where there are none."""
_POLL = 0.05


def address_toward(hosts: Sequence[str], node: int) -> str:
    """This machine's address on the way to the others; the loopback address where it is alone.

    Args:
        node: this machine's place in `hosts`.
    """
    if len(hosts) == 1:
        return LOOPBACK
    peer = hosts[1 if node == 0 else 0]
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
        # Connecting a datagram socket sends nothing; it only asks the routing table.
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    except OSError as error:
        raise JobError(f"there is no way from here to {peer}: {error.strerror}") from error


def interface_of(address: str) -> str:
    """The network interface that has this address, as NCCL and gloo want it named."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address.partition("%")[0] for entry in addresses):
            return name
    raise JobError(f"no network interface has the address {address}")


def open_store(published: Path, *, listens: bool, world: int, timeout: float, port: int = 0) -> TCPStore:
    """A store that all join: the one that listens publishes where, in a file that the others wait for.

    By itself torch's store listens on every interface; and who knows only the port meets another job's there, if that
    was quicker.

    Args:
        world: how many join.
        timeout: seconds.
        port: 0 for any free one.
    """
    from torch.distributed import TCPStore

    limit = timedelta(seconds=timeout)
    if not listens:
        host, port = _read_place(published, timeout)
        return TCPStore(host, port, world, is_master=False, timeout=limit)
    address = os.environ.get(ADDRESS_VARIABLE, LOOPBACK)
    listener = listen(port, address)
    port = listener.getsockname()[1]
    # The store owns the descriptor from here on.
    store = TCPStore(
        address, port, world, is_master=True, timeout=limit, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    write_json(published, {"host": address, "port": port})
    return store


def _read_place(published: Path, timeout: float) -> tuple[str, int]:
    deadline = time.monotonic() + timeout
    while not published.exists():
        if time.monotonic() > deadline:
            raise JobError(f"rank 0 did not say within {timeout:g} s where it listens")
        time.sleep(_POLL)
    place = read_json(published)
    return str(place["host"]), int(place["port"])
