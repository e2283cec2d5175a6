"""Scaled dot-product attention and the choice of its kernel.

A new kernel is one entry in `KERNELS`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [S, H, D]; k, v [K, H, D] -> [S, H, D], dtype of q. Strided views are read as they are."""


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention over unbatched heads by torch: the backend that `AttentionKernel.activate` prefers.

    Args:
        q: [S, H, D]; k, v: [K, H, D]. Strided views are read as they are.
    Returns:
        [S, H, D], dtype of q.
    """
    if q.shape[1] == 0:
        # With more ranks than heads a rank may hold none.
        return q
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def flash_attention_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-3 (Shah et al., 2024, arXiv 2407.08608) by the package fa3-fwd: bf16, Hopper."""
    from fa3_fwd_interface import flash_attn_func

    if q.shape[1] == 0:
        return q
    out = flash_attn_func(q[None], k[None], v[None])
    return (out[0] if isinstance(out, tuple) else out)[0]


@dataclass(frozen=True, slots=True)
class AttentionKernel:
    """How attention between tokens is computed on one kind of device."""

    name: str
    reason: str
    backends: tuple[SDPBackend, ...]
    """torch's, in order of preference; what is not self-attention always runs on them."""
    run: Attention = attention
    """Self-attention."""

    def activate(self) -> AbstractContextManager[None]:
        """Context in which `attention` prefers these backends."""
        return sdpa_kernel(list(self.backends), set_priority=True)


_FALLBACKS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
_CUDNN_FIRST = (SDPBackend.CUDNN_ATTENTION, *_FALLBACKS)
KERNELS: dict[str, AttentionKernel] = {
    "fa3": AttentionKernel(
        "fa3", "FlashAttention-3, the fastest measured on Hopper, is installed", _CUDNN_FIRST, flash_attention_3
    ),
    "cudnn": AttentionKernel(
        "cudnn", "on Hopper 1.6 times as fast as FlashAttention-2; the package fa3-fwd would be faster still",
        _CUDNN_FIRST,
    ),
    "flash": AttentionKernel("flash", "FlashAttention-2, torch's default", _FALLBACKS),
    "cpu": AttentionKernel("cpu", "no GPU", (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)),
}  # fmt: skip


def choose_kernel(device: torch.device, dtype: torch.dtype) -> AttentionKernel:
    """The fastest kernel for `device` and `dtype`, by what was measured; chosen once per job."""
    if device.type != "cuda":
        return KERNELS["cpu"]
    if torch.cuda.get_device_capability(device) != (9, 0):
        return KERNELS["flash"]
    fa3 = dtype == torch.bfloat16 and importlib.util.find_spec("fa3_fwd_interface") is not None
    return KERNELS["fa3" if fa3 else "cudnn"]
