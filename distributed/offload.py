"""Parks an idle model's parameters in host memory."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from .weights import local_rows


class HostParking:
    """Moves the storage of a model's parameters (this rank's shards) to host memory and back.

    Storages are emptied and refilled in place, so that everything that points at them stays valid: views, shards,
    what FSDP keeps. The host copy is one buffer, page-locked for a GPU: torch's own pinned allocator would round every
    tensor up to a power of two, which is tens of GB too much for a 14B expert.
    """

    def __init__(self, model: nn.Module) -> None:
        storages = {}
        for parameter in model.parameters():
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
        if self._host is not None:
            return
        self._sizes = [storage.nbytes() for storage in self._storages]
        self._host = torch.empty(sum(self._sizes), dtype=torch.uint8)
        self._lock_pages(True)
        for storage, copy in zip(self._storages, self._host.split(self._sizes), strict=True):
            copy.copy_(_bytes_of(storage))
            storage.resize_(0)

    def fetch(self) -> None:
        """Host -> device."""
        if self._host is None:
            return
        for storage, copy in zip(self._storages, self._host.split(self._sizes), strict=True):
            storage.resize_(copy.numel())
            _bytes_of(storage).copy_(copy, non_blocking=True)
        if self._on_cuda:
            torch.cuda.current_stream().synchronize()
        self._free_host()

    def drop(self) -> None:
        """Frees both: the model is not needed any more."""
        for storage in self._storages:
            storage.resize_(0)
        self._free_host()

    @property
    def _on_cuda(self) -> bool:
        return any(storage.device.type == "cuda" for storage in self._storages)

    def _lock_pages(self, lock: bool) -> None:
        if not self._on_cuda or self._host is None:
            return
        runtime = torch.cuda.cudart()
        if not lock:
            runtime.cudaHostUnregister(self._host.data_ptr())
        elif int(runtime.cudaHostRegister(self._host.data_ptr(), self._host.numel(), 0)) != 0:
            # A container may forbid locked memory; the copy is then slower, not wrong.
            logging.getLogger(__name__).warning("offload: host memory could not be page-locked")

    def _free_host(self) -> None:
        self._lock_pages(False)
        self._host = None


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
