"""The kernels as one implementation of `wan.model.ops`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..eight_bits import E4M3
from ..linear import Fp8Tokens, Linear, LinearInput
from ..ops import Ops
from .head_codes import quantise_heads
from .heads import rms_norm, rotate, rotate_codes, write_heads
from .norm import add, add_norm, norm
from .rows import cast, gelu_fp8


def gelu_linear(linear: Linear, x: LinearInput, dtype: torch.dtype) -> LinearInput:
    """`ops.gelu_linear`."""
    if dtype == E4M3:
        return gelu_fp8(linear(x))
    if not linear.is_plain or linear.bias is None or isinstance(x, Fp8Tokens) or not x.is_cuda:
        # On a CPU the product with an activation computes GELU's other form, by erf.
        return cast(F.gelu(linear(x), approximate="tanh"), dtype)
    # cuBLAS applies it to the float32 sums.
    weight = linear.unpacked_weight().t()
    return cast(torch._addmm_activation(linear.bias, x.to(weight.dtype), weight, use_gelu=True), dtype)


def triton_ops() -> Ops:
    """Needs Triton, which comes with torch's CUDA builds."""
    return Ops(
        "triton", cast, norm, add_norm, add, rms_norm, rotate, gelu_linear, rotate_codes, quantise_heads, write_heads
    )
