"""Block streaming: a model whose blocks wait in host memory and pass through two buffers on the device.

While one block computes, the next one's weights are copied into the other buffer by a stream of their own. Every
block's parameters are views of its buffer for good, so that nothing that refers to them changes from block to block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...wan.checkpoint.weights import take_memory
from ...wan.transformer.transformer import WanModel
from ..parallel.page_locks import take_host, unlock_pages
from .offload import HostParking

ALIGNMENT = 256
"""Bytes between the beginnings of a block's tensors: what the fastest kernels ask for."""
BUFFERS = 2


class BlockStream:
    """The weights of one model of equal blocks (`WanModel`), on the meta device before.

    Blocks run in the order of `model.units`. Copies and computation wait for each other by events:
    a buffer is written only when its block is done, and read only when it has arrived. On a CPU both are immediate.

    Args:
        device: where the model computes. What is not in a block stays there.
        slabs: from another stream's `hand_over`. Those of a block's size are used, the others freed.
    """

    def __init__(self, model: WanModel, device: torch.device, slabs: Sequence[Tensor] = ()) -> None:
        self._blocks = model.units
        self._device = device
        self._layouts = [_Layout(block) for block in self._blocks]
        self._size = max(layout.size for layout in self._layouts)
        within = {module for block in self._blocks for module in block.modules()}
        for module in model.modules():
            if module not in within:
                take_memory(module, device, recurse=False)
        self._rest = HostParking(model, without=self._blocks)
        self._cuda = device.type == "cuda"
        left = self._of_use(slabs)
        self._slabs = [self._take(layout.size, left) for layout in self._layouts]
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._buffers: list[Tensor] = []
        self._enter(self._slabs)
        for index, block in enumerate(self._blocks):
            block.register_forward_pre_hook(self._before(index))
            block.register_forward_hook(self._after(index))
        self.copied = 0
        """Blocks copied to the device so far."""

    @property
    def resident_bytes(self) -> int:
        """Bytes on the device now."""
        return self._rest.resident_bytes + sum(buffer.nbytes for buffer in self._buffers)

    @contextmanager
    def writable(self) -> Iterator[None]:
        """Inside, the blocks' parameters are those in host memory, to be read from files. The model must not run."""
        self._leave_buffers()
        self._rest.fetch()
        yield
        self.fetch()

    def fetch(self) -> None:
        """Makes the model ready to run."""
        self._rest.fetch()
        if self._buffers:
            return
        self._buffers = [torch.empty(self._size, dtype=torch.uint8, device=self._device) for _ in range(BUFFERS)]
        self._held: list[int | None] = [None] * BUFFERS
        if self._cuda:
            self._arrived = [torch.cuda.Event() for _ in range(BUFFERS)]
            self._done = [torch.cuda.Event() for _ in range(BUFFERS)]
            # What had the buffers' memory before may still be at work.
            for event in self._done:
                event.record()
        self._enter([self._buffers[index % BUFFERS] for index in range(len(self._blocks))])

    def park(self) -> None:
        """Leaves nothing on the device. The model must not run until `fetch`."""
        self._leave_buffers()
        self._rest.park()

    def drop(self) -> None:
        """Frees everything: the model is not needed any more."""
        self._leave_buffers()
        self._rest.drop()
        self._free(self._slabs)

    def hand_over(self) -> list[Tensor]:
        """The host's memory for a model that takes this one's place: `drop` is what is left to do with this one.

        To take 28 GB and lock their pages anew takes longer than to read them from the system's cache.
        """
        self._leave_buffers()
        slabs, self._slabs = self._slabs, []
        return slabs

    def _of_use(self, slabs: Sequence[Tensor]) -> list[Tensor]:
        """Those of a size that is needed, as many as are. Others are freed: the host may have room for one model."""
        needed, kept = Counter(layout.size for layout in self._layouts), []
        for slab in slabs:
            needed[slab.numel()] -= 1
            if needed[slab.numel()] < 0:
                self._free([slab])
            else:
                kept.append(slab)
        return kept

    def _take(self, size: int, left: list[Tensor]) -> Tensor:
        for index, slab in enumerate(left):
            if slab.numel() == size:
                return left.pop(index)
        return take_host(size, locked=self._cuda)

    def _free(self, slabs: Sequence[Tensor]) -> None:
        for slab in slabs:
            if self._cuda:
                unlock_pages(slab)
            slab.untyped_storage().resize_(0)

    def _leave_buffers(self) -> None:
        if not self._buffers:
            return
        if self._cuda:
            torch.cuda.synchronize(self._device)
        self._buffers = []
        self._enter(self._slabs)

    def _enter(self, places: list[Tensor]) -> None:
        for layout, place in zip(self._layouts, places, strict=True):
            layout.enter(place)

    def _before(self, index: int) -> Callable[..., None]:
        following = (index + 1) % len(self._blocks)

        def hook(block: nn.Module, inputs: Any) -> None:
            self._copy(index)
            if self._cuda:
                torch.cuda.current_stream(self._device).wait_event(self._arrived[index % BUFFERS])
            # With an odd number of blocks the first one's buffer is the last one's.
            if following % BUFFERS != index % BUFFERS:
                self._copy(following)

        return hook

    def _after(self, index: int) -> Callable[..., None]:
        def hook(block: nn.Module, inputs: Any, output: Any) -> None:
            if self._cuda:
                self._done[index % BUFFERS].record()

        return hook

    def _copy(self, index: int) -> None:
        """Brings a block into its buffer, unless it is there."""
        slot = index % BUFFERS
        if self._held[slot] == index:
            return
        self._held[slot] = index
        self.copied += 1
        slab = self._slabs[index]
        target = self._buffers[slot][: slab.numel()]
        if self._stream is None:
            target.copy_(slab)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._done[slot])
            target.copy_(slab, non_blocking=True)
            self._arrived[slot].record(self._stream)


class _Layout:
    """Where each parameter of a block lies in its slab."""

    def __init__(self, block: nn.Module) -> None:
        self._places: list[tuple[nn.Module, str, int]] = []
        self.size = 0
        for module in block.modules():
            for name, parameter in module.named_parameters(recurse=False):
                self._places.append((module, name, self.size))
                self.size += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT

    def enter(self, place: Tensor) -> None:
        """Makes the parameters views of `place`, uint8."""
        for module, name, start in self._places:
            parameter = getattr(module, name)
            view = place[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(view, requires_grad=False))
            else:
                parameter.data = view
