"""Tensors in what other nodes hand on, checked before anything is asked of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .declared import kind_of

if TYPE_CHECKING:
    from torch import Tensor


def tensor_of(value: Any, name: str, allowed: str) -> Tensor:
    """The tensor, on the CPU. Raises ValueError if `value` is not a plain one of real numbers.

    Args:
        allowed: what it must be, for the message.
    """
    import torch

    plain = (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not (value.is_nested or value.is_quantized or value.is_meta or value.is_complex())
    )
    if not plain:
        raise ValueError(f"{name} is {kind_of(value)}; it must be {allowed}")
    return value.detach().cpu()
