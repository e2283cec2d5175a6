"""Builds a checkpoint's model and fills its parameters, each rank only the rows that it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import local
from typing import Any

import torch
from torch import Tensor, nn

from ..files.stored_tensor import STAGING_BYTES
from ..lora.beside import LORA_FACTORS, read_factor
from ..lora.lora import Lora
from ..lora.merging import changes, merge
from ..model.eight_bits import KeptWeight, quantise_rows, rotate_inputs
from ..model.linear import Linear
from ..model.precisions import TORCH_NAMES
from ..transformer.transformer import WanModel, meta_model
from .checkpoint import Checkpoint
from .keeping import MERGED, Keeping

CUDA_READERS = 4
"""Threads that read and copy at the same time: one cannot keep both the disk and the bus busy."""
MERGED_ELEMENTS = 16 << 20
"""Of a weight, in float32 at once, while LoRAs are merged into it."""
_BESIDE_WEIGHT = ("weight_scale", *LORA_FACTORS)
"""What a layer has besides its weight for the product with it."""
COMPUTE_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, known) for name, known in TORCH_NAMES.items()}
"""Of matrix products, by the names that a job gives them."""


def empty_model(
    checkpoint: Checkpoint, compute: torch.dtype, loras: Sequence[Lora] = (), keeping: Keeping = MERGED
) -> WanModel:
    """The model of `checkpoint` on the meta device, each parameter in the dtype that it will be kept in.

    Args:
        compute: dtype of the matrix products.
        loras: those that `read_weights` will read.
    """
    return meta_model(
        checkpoint.config, compute, keeping.weights(checkpoint, loras),
        fp8_products=keeping.fp8_products(checkpoint.config),
    )  # fmt: skip


def empty_twin(model: WanModel) -> WanModel:
    """A model on the meta device whose layers keep and multiply their weights as those of `model` do."""
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    twin = meta_model(model.config, model.running_order[0].self_attn.q.compute_dtype, kept_weights(model))
    for mine, its in zip((module for module in twin.modules() if isinstance(module, Linear)), layers, strict=True):
        mine.fp8_product, mine.int8_product = its.fp8_product, its.int8_product
    return twin


def take_memory(
    module: nn.Module,
    device: torch.device,
    *,
    recurse: bool = True,
    then: Callable[[Tensor, Tensor], None] = lambda before, taken: None,
) -> None:
    """Gives what lies on the meta device memory on `device`, whatever is in it. As `nn.Module.to_empty`.

    Args:
        then: called with each tensor of before, and what has taken its place.
    """

    def empty(tensor: Tensor) -> Tensor:
        if getattr(tensor, "placements", None) is not None:
            taken = torch.empty_like(tensor, device=device)
        else:
            # Asked for something like a tensor without memory, torch imports sympy: a second of every rank's start.
            taken = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        then(tensor, taken)
        return taken

    module._apply(empty, recurse=recurse)


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
        loras: merged into the rows as they arrive, in float32, or read beside them.
        part, parts: read only what `owners` gives to this one of the processes that share the work.
        on_tensor: called with (tensors read, tensors in all).
        meanwhile: called on this thread while others read.
    """
    parameters = dict(model.named_parameters())
    owner = owners(model, names, parts)
    names = [name for name in owner if owner[name] == part]
    mine = _Reader()

    kept = kept_weights(model)

    def made_here(name: str) -> bool:
        """Whether the weight's values are not just the file's, or not in the file's codes."""
        dtype = kept[name].dtype if name in kept else None
        recoded = dtype is not None and (name not in checkpoint.codes or checkpoint.codes[name].dtype != dtype)
        return recoded or changes(loras, name, without_products=name in kept and kept[name].lora_rank > 0)

    def read(name: str) -> None:
        rows, row = local_rows(parameters[name])
        if rows.numel() == 0:
            return
        start = row * rows[0].numel()
        if mine.staging is None:
            mine.staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=on_cuda)
        layer, _, kind = name.rpartition(".")
        weight = name if kind not in _BESIDE_WEIGHT else f"{layer}.weight"
        if kind in LORA_FACTORS:
            read_factor(loras, weight, kind, rows, row)
        elif weight == name:
            if name in kept:
                rows = rows.view(kept[name].dtype)
            if made_here(name):
                scale = parameters.get(f"{name}_scale")
                scales = None if scale is None else local_rows(scale)[0]
                _read_merged(checkpoint, loras, name, kept.get(name), rows, row, scales, mine.staging, device)
            else:
                checkpoint.read_into(name, rows, start=start, staging=mine.staging)
        # The scale of such a weight is a new one, written with the weight.
        elif not made_here(weight):
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


def kept_weights(model: nn.Module) -> dict[str, KeptWeight]:
    """The weights of `model` that it keeps in 8 bits."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, Linear))
    return {f"{name}.weight": layer.kept for name, layer in layers if layer.kept is not None}


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
    kept: KeptWeight | None,
    rows: Tensor,
    row: int,
    scales: Tensor | None,
    staging: Tensor,
    device: torch.device,
) -> None:
    """Reads rows in float32, adds what `loras` change, and rounds once, to the dtype of `rows` or to codes with scales.

    A row of the file's own codes keeps its scale there if what it becomes fits it: what is not changed keeps its bits.
    Computes on `device`, also for rows that wait in host memory.

    Args:
        row: number of the first of them in the whole weight.
    """
    per_row = rows[0].numel()
    stored = checkpoint.codes.get(name)

    def read_rows(first: int, count: int) -> Tensor:
        """Of the whole weight."""
        values = torch.empty(count, per_row, dtype=torch.float32, device=device)
        checkpoint.read_into(name, values, start=first * per_row, staging=staging)
        return values

    count = max(MERGED_ELEMENTS // per_row, 1)
    for first in range(0, rows.shape[0], count):
        part = rows[first : first + count]
        values = torch.empty(part.shape, dtype=torch.float32, device=device)
        checkpoint.read_into(name, values, start=(row + first) * per_row, staging=staging)
        negative = values.signbit()
        merge(
            loras, name, values, row + first, read_rows,
            without_products=kept is not None and kept.lora_rank > 0,
        )  # fmt: skip
        # Zeros have signs in fp8, which they lose in a sum.
        values.masked_fill_(negative & (values == 0), -0.0)
        if kept is not None and scales is not None:
            own = None
            if stored is not None and stored.dtype == kept.dtype:
                own = torch.ones(part.shape[0], 1, device=device)
                if stored.scaled:
                    checkpoint.read_into(f"{name}_scale", own, start=row + first)
            if kept.rotated_by:
                values = rotate_inputs(values, kept.rotated_by)
            values, scales[first : first + count] = quantise_rows(values, kept.dtype, own)
        part.copy_(values)


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """This rank's part of a parameter, and the number of its first row in the whole."""
    # A DTensor, known by its placements: naming the class would import it, two seconds that only FSDP needs.
    placements = getattr(parameter, "placements", None)
    if placements is None:
        return parameter.data, 0
    (placement,) = placements
    assert placement.is_shard(0), f"parameters are sharded over dimension 0, not {placement}"
    sharded: Any = parameter
    per_rank = -(-parameter.shape[0] // sharded.device_mesh.size())
    row = min(sharded.device_mesh.get_local_rank() * per_rank, parameter.shape[0])
    return sharded.to_local(), row
