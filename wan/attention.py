"""Scaled dot-product attention and the choice of its kernel."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention over unbatched heads.

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


@dataclass(frozen=True, slots=True)
class AttentionKernel:
    """A preference order of torch's attention backends, for one kind of device."""

    name: str
    reason: str
    backends: tuple[SDPBackend, ...]

    def activate(self) -> AbstractContextManager[None]:
        """Context in which `attention` prefers these backends."""
        return sdpa_kernel(list(self.backends), set_priority=True)


_FALLBACKS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
KERNELS: dict[str, AttentionKernel] = {
    "cudnn": AttentionKernel(
        "cudnn",
        "on Hopper cuDNN's kernel is about 1.6 times as fast as FlashAttention-2",
        (SDPBackend.CUDNN_ATTENTION, *_FALLBACKS),
    ),
    "flash": AttentionKernel("flash", "FlashAttention-2, torch's default", _FALLBACKS),
    "cpu": AttentionKernel("cpu", "no GPU", (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)),
}


def choose_kernel(device: torch.device) -> AttentionKernel:
    """The fastest kernel for `device`, by what was measured; chosen once per process."""
    if device.type != "cuda":
        return KERNELS["cpu"]
    return KERNELS["cudnn" if torch.cuda.get_device_capability(device) == (9, 0) else "flash"]
