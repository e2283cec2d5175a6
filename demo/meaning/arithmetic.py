"""In what numbers the experts compute: to see what 8 bits cost of what a clip shows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...distributed.job.job import Parallel
from ...wan.model.attention import Attention, attention
from ...wan.model.attention_kernels import KERNELS
from ...wan.model.codes import CodesAttention, Heads, quantise_heads
from ...wan.model.linear import E4M3

RANGE = 256.0
"""What FlashAttention-3 multiplies probabilities by before it rounds them, so that small ones keep their bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arithmetic:
    parallel: Parallel
    """Its precisions."""
    attention: Attention = attention
    exact_attention: Attention = attention
    """In steps and blocks that round nothing to 8 bits."""


FULL = Arithmetic(parallel=Parallel(gpu_count=1, mixed_precision="fp32"))


def eight_bits(device: torch.device) -> dict[str, Arithmetic]:
    """bf16, and what linear_precision and attention of a job make of it. Without Hopper's units they are emulated."""
    kernel = KERNELS["fa3-fp8"]
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    run = attention_of_codes if kernel.obstacle(capability, torch.bfloat16) else kernel.run
    fp8 = Parallel(gpu_count=1, linear_precision="fp8")
    return {
        "bf16": Arithmetic(parallel=Parallel(gpu_count=1)),
        "fp8 linears": Arithmetic(parallel=fp8),
        "fp8 linears and attention": Arithmetic(parallel=fp8, attention=run),
    }


@CodesAttention
def attention_of_codes(q: Heads, k: Heads, v: Heads) -> Tensor:
    """What the kernel fa3-fp8 computes, in torch's own operations: q, k, v and the probabilities are e4m3 codes.

    Args as for `wan.model.attention.flash_attention_3_fp8`. Returns [S, H, D], bf16 of codes that came so.
    """
    dtype = q.dtype if isinstance(q, Tensor) else torch.bfloat16
    codes = (quantise_heads(x) if isinstance(x, Tensor) else x for x in (q, k, v))
    (q8, q_scale), (k8, k_scale), (v8, v_scale) = codes
    q_, k_, v_ = (x.float().transpose(0, 1) for x in (q8, k8, v8))
    logits = q_ @ k_.mT * (q_scale * k_scale / math.sqrt(q8.shape[-1])).view(-1, 1, 1)
    weights = (logits - logits.amax(-1, keepdim=True)).exp() * RANGE
    # The sum is of the weights before they are rounded.
    out = weights.to(E4M3).float() @ v_ * v_scale.view(-1, 1, 1) / weights.sum(-1, keepdim=True)
    return out.transpose(0, 1).to(dtype)
