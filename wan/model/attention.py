"""Scaled dot-product attention, by torch and by packages; attention_kernels.py says which can run where."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .codes import CodesAttention, Heads, quantise_heads

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
    return q if q.shape[1] == 0 else _fa3(q, k, v)


def _fa3(q: Tensor, k: Tensor, v: Tensor, **descale: Tensor) -> Tensor:
    from fa3_fwd_interface import flash_attn_func

    q, k, v = q[None], k[None], v[None]
    if hasattr(torch.ops.fa3_fwd, "fwd"):
        # What the package's function calls in the end. On the way there it imports torch's compiler, for two of the
        # seconds that a video waits for its first step.
        return torch.ops.fa3_fwd.fwd(q, k, v, softmax_scale=q.shape[-1] ** -0.5, num_splits=1, **descale)[0][0]
    out = flash_attn_func(q, k, v, **descale)
    return (out[0] if isinstance(out, tuple) else out)[0]


@CodesAttention
def flash_attention_3_fp8(q: Heads, k: Heads, v: Heads) -> Tensor:
    """FlashAttention-3 on e4m3 codes with one scale per head and tensor (section 3.3 there):

        softmax(sq sk q8 k8^T / sqrt(D)) sv v8

    The kernel multiplies by the scales inside. Lossy: a relative error of about 5e-2 per call on Gaussian input, and
    6e-2 on input with loud channels if q and k come as `codes.spread_codes`, 2e-1 otherwise. Returns bf16.
    """
    codes, scales = zip(*(quantise_heads(x) if isinstance(x, Tensor) else x for x in (q, k, v)), strict=True)
    if codes[0].shape[1] == 0:
        return codes[0].to(torch.bfloat16)
    names = ("q_descale", "k_descale", "v_descale")
    descale = {name: scale[None] for name, scale in zip(names, scales, strict=True)}
    return _fa3(*codes, **descale).to(torch.bfloat16)


def flash_attention_2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-2 (Dao, 2023, arXiv 2307.08691) by the package flash-attn."""
    from flash_attn import flash_attn_func

    return q if q.shape[1] == 0 else flash_attn_func(q[None], k[None], v[None])[0]


def sage_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SageAttention 1 (Zhang et al., 2024, arXiv 2410.02367): q k^T on int8 codes, k with its mean taken off.

    Lossy: a relative error of about 1e-2 per call on Gaussian input.
    """
    from sageattention import sageattn

    return q if q.shape[1] == 0 else sageattn(q[None], k[None], v[None], tensor_layout="NHD")[0]
