"""torchrun's rendezvous where one agent runs all ranks: it has nobody to meet.

Its own ones keep a file, in which a record that a full disk has cut short is waited for without end, or listen on every
interface.
"""

from __future__ import annotations

from torch.distributed import HashStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

BACKEND = "alone"


class Alone(RendezvousHandler):
    """The rendezvous of an agent with itself, in its own memory."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        self._store = HashStore()

    def get_backend(self) -> str:
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        # Handed to the ranks as MASTER_ADDR and MASTER_PORT, which ours do not use.
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo("127.0.0.1", 0))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def register() -> None:
    """Makes it known to torchrun under its name."""
    rendezvous_handler_registry.register(BACKEND, Alone)
