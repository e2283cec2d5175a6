"""Tensors in what other nodes hand on, checked before anything is asked of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...distributed.job.errors import counted
from .declared import kind_of

if TYPE_CHECKING:
    from torch import Tensor


def tensor_of(value: Any, name: str, allowed: str, *, mask: bool = False) -> Tensor:
    """The tensor, on the CPU. Raises ValueError if `value` is not a plain one of real, finite numbers.

    Args:
        allowed: what it must be, for the message.
        mask: whole numbers will do. Those of a picture are on another scale than 0 to 1.
    """
    import torch

    plain = (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not (value.is_nested or value.is_quantized or value.is_meta or value.is_complex())
    )
    if not plain:
        raise ValueError(f"{name} is {kind_of(value)}; it must be {allowed}")
    if not (mask or value.is_floating_point()):
        raise ValueError(f"{name} holds whole numbers ({value.dtype}); it must be {allowed} in floating point")
    on_cpu = value.detach().cpu()
    check_finite(name, on_cpu)
    return on_cpu


def check_finite(name: str, value: Tensor) -> None:
    """Raises ValueError if it holds a NaN or something infinite: of a whole video nothing would be left."""
    import torch

    if value.itemsize == 1:
        # What fp8 can do on a CPU is little.
        value = value.float()
    if not value.numel() or all(bound.isfinite() for bound in torch.aminmax(value)):
        return
    wrong = value.numel() - int(value.isfinite().sum())
    raise ValueError(
        f"{name} holds {counted(wrong, 'value')} of {value.numel()} that {'is' if wrong == 1 else 'are'} NaN or "
        "infinite; it must be numbers only. Look at the node that makes it"
    )
