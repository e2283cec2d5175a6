"""Stored tensors -> the parameters of a module, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .headers import brief, check_shape
from .stored_tensor import STAGING_BYTES, StoredTensor


def fill(
    model: nn.Module,
    stored: Mapping[str, StoredTensor],
    source: Mapping[str, str],
    label: str,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Gives a model built on the meta device its weights: each is read, cast and moved alone.

    Args:
        stored: by tensor name, with scales.
        source: parameter name of the model -> tensor name, for every parameter.
        label: the files, for messages.
        check: called before each tensor; what it raises ends the reading.
    Raises:
        ValueError: a tensor has another shape than the model's, or cannot be read.
    """
    device = torch.device(device)
    staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    weights: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}
    for parameter, meta in model.state_dict().items():
        name = source[parameter]
        check_shape(name, stored[name].shape, tuple(meta.shape), label)
        if name not in read:
            check()
            read[name] = torch.empty(meta.shape, dtype=dtype, device=device)
            try:
                stored[name].read_into(read[name], staging=staging)
            except OSError as error:
                raise ValueError(f"{label}: tensor {name} cannot be read: {brief(error)}") from error
        weights[parameter] = read[name]
    # assign: the parameters become these very tensors, whatever dtype the library would prefer for them.
    model.load_state_dict(weights, assign=True)
    model.requires_grad_(False).eval()
