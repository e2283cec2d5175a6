"""Fills a model's parameters from a checkpoint, each rank only the rows that it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import local

import torch
from torch import Tensor, nn

from ..wan.checkpoint import STAGING_BYTES, Checkpoint
from ..wan.lora import Lora, merge

CUDA_READERS = 4
"""Threads that read and copy at the same time: one cannot keep both the disk and the bus busy."""


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    loras: Sequence[Lora] = (),
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Allocates `model` on `device` and reads its parameters.

    Host memory stays at the rows kept (on a CPU) plus one staging buffer per reader.

    Args:
        loras: merged into the rows as they arrive, in float32.
        on_tensor: called with (tensors read, tensors in all).
    """
    model.to_empty(device=device)
    parameters = list(model.named_parameters())
    buffers = local()

    def read(item: tuple[str, Tensor]) -> None:
        name, parameter = item
        rows, start = local_rows(parameter)
        if rows.numel() == 0:
            return
        if not hasattr(buffers, "staging"):
            buffers.staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
        checkpoint.read_into(name, rows, start=start, staging=buffers.staging)
        merge(loras, name, rows, start // max(parameter.numel() // parameter.shape[0], 1))

    on_cuda = device.type == "cuda"
    # A thread starts on GPU 0; page-locking a buffer there would cost every rank a context on it.
    enter = partial(torch.cuda.set_device, device) if on_cuda else None
    with torch.no_grad(), ThreadPoolExecutor(CUDA_READERS if on_cuda else 1, initializer=enter) as readers:
        for done, _ in enumerate(readers.map(read, parameters), start=1):
            on_tensor(done, len(parameters))


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """This rank's part of a parameter, and the flat index of its first element in the whole."""
    # A DTensor, known by its placements: naming the class would import it, two seconds that only FSDP needs.
    placements = getattr(parameter, "placements", None)
    if placements is None:
        return parameter.data, 0
    (placement,) = placements
    assert placement.is_shard(0), f"parameters are sharded over dimension 0, not {placement}"
    per_rank = -(-parameter.shape[0] // parameter.device_mesh.size())
    row = min(parameter.device_mesh.get_local_rank() * per_rank, parameter.shape[0])
    return parameter.to_local(), row * (parameter.numel() // parameter.shape[0])
