"""Builds a checkpoint's model and fills its parameters, each rank only the rows that it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from threading import local
from typing import Any

import torch
from torch import Tensor, nn

from ..files.stored_tensor import STAGING_BYTES
from ..lora.lora import Lora, changes, merge
from ..model.linear import E4M3, FP8_DTYPES, FP8_PRODUCTS, Fp8Weight, quantise_rows
from ..model.precisions import TORCH_NAMES
from ..transformer.transformer import WanModel, meta_model
from .checkpoint import Checkpoint

CUDA_READERS = 4
"""Threads that read and copy at the same time: one cannot keep both the disk and the bus busy."""
MERGED_ELEMENTS = 16 << 20
"""Of a weight, in float32 at once, while LoRAs are merged into it."""
COMPUTE_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, known) for name, known in TORCH_NAMES.items()}
"""Of matrix products, by the names that a job gives them."""


def empty_model(
    checkpoint: Checkpoint, compute: torch.dtype, loras: Sequence[Lora] = (), *, fp8_products: bool = False
) -> WanModel:
    """The model of `checkpoint` on the meta device, each parameter in the dtype that it will be kept in.

    Args:
        compute: dtype of the matrix products.
        loras: those that `read_weights` will merge; an fp8 weight that they change gets a scale for each row.
        fp8_products: the large layers multiply e4m3 codes: the file's where it has them, or made of its values.
    """
    fp8 = {
        name: replace(weight, scaled=weight.scaled or changes(loras, name)) for name, weight in checkpoint.fp8.items()
    }
    if fp8_products:
        for block, layer in product(checkpoint.config.block_names, FP8_PRODUCTS):
            name = f"{block}.{layer}.weight"
            if name not in fp8 or fp8[name].dtype != E4M3:
                fp8[name] = Fp8Weight(E4M3, scaled=True)
    return meta_model(checkpoint.config, compute, fp8, fp8_products=fp8_products)


def read_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    names: Sequence[str] | None = None,
    *,
    device: torch.device,
    loras: Sequence[Lora] = (),
    part: int = 0,
    parts: int = 1,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Reads parameters of a model that has its memory, on threads and CUDA streams of their own.

    Host memory stays at the rows kept (on a CPU) plus one staging buffer per reader. If `on_tensor` or `meanwhile`
    raises, the rest is not read.

    Args:
        model: from `empty_model` with the same LoRAs, sharded over rows or not.
        names: of the parameters; None for all.
        loras: merged into the rows as they arrive, in float32.
        part, parts: read only what `owners` gives to this one of the processes that share the work.
        on_tensor: called with (tensors read, tensors in all).
        meanwhile: called on this thread while others read.
    """
    parameters = dict(model.named_parameters())
    owner = owners(model, names, parts)
    names = [name for name in owner if owner[name] == part]
    mine = _Reader()

    def made_here(name: str) -> bool:
        """Whether the weight's values are not just the file's, or not in the file's codes."""
        dtype, stored = parameters[name].dtype, checkpoint.fp8.get(name)
        recoded = dtype in FP8_DTYPES and (stored is None or stored.dtype != dtype)
        return recoded or changes(loras, name)

    def read(name: str) -> None:
        rows, start = local_rows(parameters[name])
        if rows.numel() == 0:
            return
        if mine.staging is None:
            mine.staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=on_cuda)
        weight = name.removesuffix("_scale")
        if weight == name and made_here(name):
            scale = parameters.get(f"{name}_scale")
            scales = None if scale is None else local_rows(scale)[0]
            _read_merged(checkpoint, loras, name, rows, start, scales, mine.staging, device)
        # The scale of such a weight is a new one, written with the weight.
        elif weight == name or not made_here(weight):
            checkpoint.read_into(name, rows, start=start, staging=mine.staging)
        if on_cuda:
            # What was computed of the file's values is queued on this reader's own stream.
            torch.cuda.current_stream(device).synchronize()

    on_cuda = device.type == "cuda"
    # Their memory may have been freed by kernels that are still queued on this thread's stream.
    began = torch.cuda.current_stream(device).record_event() if on_cuda else None

    def enter() -> None:
        if began is not None:
            # A thread starts on GPU 0; page-locking a buffer there would cost every rank a context on it.
            torch.cuda.set_device(device)
            # Not the stream of the steps, behind which each copy would wait.
            stream = torch.cuda.Stream(device)
            stream.wait_event(began)
            torch.cuda.set_stream(stream)

    with torch.no_grad(), ThreadPoolExecutor(CUDA_READERS if on_cuda else 1, initializer=enter) as readers:
        results = readers.map(read, names)
        try:
            meanwhile()
            for done, _ in enumerate(results, start=1):
                on_tensor(done, len(names))
        except BaseException:
            readers.shutdown(cancel_futures=True)
            raise


class _Reader(local):
    """What a thread that reads has to itself."""

    staging: Tensor | None = None
    """Made when it first reads."""


def owners(model: nn.Module, names: Sequence[str] | None, parts: int) -> dict[str, int]:
    """Parameter -> which of `parts` processes reads it: about equally many bytes each, a weight and its scale together.

    Args:
        names: of the parameters; None for all.
    """
    parameters = dict(model.named_parameters())
    names = list(parameters) if names is None else names
    of_weight: dict[str, int] = {}
    loads = [0] * parts
    for weight in dict.fromkeys(name.removesuffix("_scale") for name in names):
        of_weight[weight] = loads.index(min(loads))
        loads[of_weight[weight]] += parameters[weight].nbytes
    return {name: of_weight[name.removesuffix("_scale")] for name in names}


def _read_merged(
    checkpoint: Checkpoint,
    loras: Sequence[Lora],
    name: str,
    rows: Tensor,
    start: int,
    scales: Tensor | None,
    staging: Tensor,
    device: torch.device,
) -> None:
    """Reads rows in float32, adds what `loras` change, and rounds once: to the dtype of `rows`, or to fp8 `scales`.

    A row of the file's own codes keeps its scale there if what it becomes fits it: what is not changed keeps its bits.
    Computes on `device`, also for rows that wait in host memory.
    """
    per_row = rows.numel() // rows.shape[0]
    stored = checkpoint.fp8.get(name)

    def read_rows(first: int, count: int) -> Tensor:
        """Of the whole weight."""
        values = torch.empty(count, per_row, dtype=torch.float32, device=device)
        checkpoint.read_into(name, values, start=first * per_row, staging=staging)
        return values

    count = max(MERGED_ELEMENTS // per_row, 1)
    for first in range(0, rows.shape[0], count):
        part = rows[first : first + count]
        values = torch.empty(part.shape, dtype=torch.float32, device=device)
        checkpoint.read_into(name, values, start=start + first * per_row, staging=staging)
        negative = values.signbit()
        merge(loras, name, values, start // per_row + first, read_rows)
        # Zeros have signs in fp8, which they lose in a sum.
        values.masked_fill_(negative & (values == 0), -0.0)
        if scales is not None:
            kept = None
            if stored is not None and stored.dtype == rows.dtype:
                kept = torch.ones(part.shape[0], 1, device=device)
                if stored.scaled:
                    checkpoint.read_into(f"{name}_scale", kept, start=start // per_row + first)
            values, scales[first : first + count] = quantise_rows(values, rows.dtype, kept)
        part.copy_(values)


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """This rank's part of a parameter, and the flat index of its first element in the whole."""
    # A DTensor, known by its placements: naming the class would import it, two seconds that only FSDP needs.
    placements = getattr(parameter, "placements", None)
    if placements is None:
        return parameter.data, 0
    (placement,) = placements
    assert placement.is_shard(0), f"parameters are sharded over dimension 0, not {placement}"
    sharded: Any = parameter
    per_rank = -(-parameter.shape[0] // sharded.device_mesh.size())
    row = min(sharded.device_mesh.get_local_rank() * per_rank, parameter.shape[0])
    return sharded.to_local(), row * (parameter.numel() // parameter.shape[0])
