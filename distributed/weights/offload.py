"""Parks an idle model's parameters in host memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...wan.checkpoint.weights import local_rows
from ..parallel.page_locks import take_host, unlock_pages


class HostParking:
    """Moves the storage of a model's parameters (this rank's shards) to host memory and back.

    Storages are emptied and refilled in place, so that everything that points at them stays valid: views, shards,
    what FSDP keeps. The host copy is one buffer, page-locked for a GPU: torch's own pinned allocator would round every
    tensor up to a power of two, which is tens of GB too much for a 14B expert.

    Args:
        without: parts of `model` to leave alone.
        keep: keep the host copy while the model is on the device: its parameters are never written, and parking it
            again costs nothing.
    """

    def __init__(self, model: nn.Module, *, without: Iterable[nn.Module] = (), keep: bool = False) -> None:
        self._keep, self._parked = keep, False
        storages = {}
        others = {id(parameter) for part in without for parameter in part.parameters()}
        for parameter in model.parameters():
            if id(parameter) in others:
                continue
            storage = local_rows(parameter)[0].untyped_storage()
            storages[storage._cdata] = storage
        self._storages = list(storages.values())
        self._host: Tensor | None = None

    @property
    def resident_bytes(self) -> int:
        """Bytes on the device now."""
        return sum(storage.nbytes() for storage in self._storages)

    def park(self) -> None:
        """Device -> host. The model must not run until `fetch`."""
        if self._parked:
            return
        if self._host is None:
            self._sizes = [storage.nbytes() for storage in self._storages]
            self._host = take_host(sum(self._sizes), locked=self._on_cuda)
            for storage, copy in zip(self._storages, self._host.split(self._sizes), strict=True):
                copy.copy_(_bytes_of(storage))
        for storage in self._storages:
            storage.resize_(0)
        self._parked = True

    def fetch(self) -> None:
        """Host -> device."""
        if not self._parked:
            return
        assert self._host is not None, "where it was parked to"
        for storage, copy in zip(self._storages, self._host.split(self._sizes), strict=True):
            storage.resize_(copy.numel())
            _bytes_of(storage).copy_(copy, non_blocking=True)
        if self._on_cuda:
            torch.cuda.current_stream().synchronize()
        self._parked = False
        if not self._keep:
            self._free_host()

    def trade(self, leaving: HostParking) -> bool:
        """Host -> device while `leaving` goes the other way, tensor by tensor, into the host memory that becomes free.

        Nothing is taken and page-locked anew, which for 28 GB takes 13 seconds, and the host holds one copy, not two.

        Returns:
            whether it was done: only this one is parked, neither keeps a copy, and their tensors are of equal sizes.
        """
        if not self._parked or leaving._host is not None or self._keep or leaving._keep:
            return False
        if self._sizes != [storage.nbytes() for storage in leaving._storages]:
            return False
        assert self._host is not None, "where it was parked to"
        for mine, other, copy in zip(self._storages, leaving._storages, self._host.split(self._sizes), strict=True):
            mine.resize_(copy.numel())
            # One stream: it has been read when it is written to.
            _bytes_of(mine).copy_(copy, non_blocking=True)
            copy.copy_(_bytes_of(other), non_blocking=True)
            other.resize_(0)
        if self._on_cuda:
            torch.cuda.current_stream().synchronize()
        leaving._host, leaving._sizes, leaving._parked = self._host, self._sizes, True
        self._host, self._parked = None, False
        return True

    @property
    def has_copy(self) -> bool:
        """The host holds the parameters, whether the device does or not."""
        return self._host is not None

    @contextmanager
    def writable(self) -> Iterator[None]:
        """Inside, the model's parameters can be written."""
        self.fetch()
        yield

    def hand_over(self) -> list[Tensor]:
        """As `BlockStream.hand_over`: nothing, for there is no host memory of a model that is on the device."""
        return []

    def drop(self) -> None:
        """Frees both: the model is not needed any more."""
        for storage in self._storages:
            storage.resize_(0)
        self._free_host()

    @property
    def _on_cuda(self) -> bool:
        return any(storage.device.type == "cuda" for storage in self._storages)

    def _free_host(self) -> None:
        if self._on_cuda and self._host is not None:
            unlock_pages(self._host)
        self._host = None


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
