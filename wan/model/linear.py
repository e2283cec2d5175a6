"""Linear layers, whose weights may be kept in 8 bits, and products of fp8 by fp8.

W = codes * scale      one scale per output row (eight_bits.py)
x = codes * scale      one scale per token, where products are of codes by codes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .eight_bits import CODES, E4M3, KeptWeight, quantise_rows, rotate_inputs

FP8_PRODUCTS = (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2"
)  # fmt: skip
"""The layers of a block that are multiplied in 8 bits: those that every token goes through."""


class Fp8Tokens(NamedTuple):
    """Activations in e4m3."""

    codes: Tensor
    """[n, in]."""
    scale: Tensor
    """[n, 1], float32."""


LinearInput = Tensor | Fp8Tokens


class Linear(nn.Linear):
    """A linear layer that computes in `compute_dtype`, or multiplies codes and returns that.

    A weight that is kept in 8 bits stays so in memory: `weight_scale` is None or [out, 1] float32, which a sharding
    over rows cuts as it cuts the weight. It is unpacked for each use unless there is a product of codes.

    LoRAs may stay beside it, `lora_down` [rank, in] and `lora_up` [out, rank], their strengths in the latter:
    y = x W^T + (x down^T) up^T, each of the three products rounded to `compute_dtype`, and their sum.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        for name in ("weight_scale", "lora_down", "lora_up"):
            self.register_parameter(name, None)
        self._compute_dtype: torch.dtype | None = None
        self.kept: KeptWeight | None = None
        """How the weight is kept in 8 bits; None: as floats."""
        self.fp8_product = False
        """Multiply e4m3 codes by e4m3 codes; the weight must be kept as such."""
        self.int8_product: Callable[[Tensor, Tensor, Tensor, Tensor | None, int], Tensor] | None = None
        """Multiplies the int8 codes (int8_products.py)."""
        self.exact = False
        """For now codes are unpacked, and what is multiplied by them is not rounded."""

    def reset_parameters(self) -> None:
        """Fills the weight with random numbers, as torch does, where it has memory."""
        # Torch would go through the motions without: half of the time that the making of an empty model takes.
        if not self.weight.is_meta:
            super().reset_parameters()

    @property
    def compute_dtype(self) -> torch.dtype:
        """That of the weight, unless `keep` set another."""
        return self._compute_dtype or self.weight.dtype

    @property
    def input_dtype(self) -> torch.dtype:
        """What `forward` multiplies; it takes other float types too. E4M3 stands for `Fp8Tokens`."""
        return E4M3 if self.fp8_product and not self.exact else self.compute_dtype

    @property
    def is_plain(self) -> bool:
        """`forward` is nothing but the product with `unpacked_weight` and the bias."""
        turned = self.kept is not None and self.kept.rotated_by > 0
        by_codes = (self.fp8_product or self.int8_product) and not self.exact
        return not (by_codes or turned or self.lora_down is not None)

    @property
    def keeps_int8(self) -> bool:
        """`weight` has the bytes of int8 codes."""
        return self.kept is not None and self.kept.dtype == torch.int8

    def keep(self, kept: KeptWeight, compute: torch.dtype) -> None:
        """Keeps the weight as `kept` says and computes in `compute`. Leaves the values undefined."""
        assert kept.dtype in CODES, kept
        self._compute_dtype, self.kept = compute, kept

        def parameter(dtype: torch.dtype, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=self.weight.device), requires_grad=False)

        self.weight = parameter(kept.storage, *self.weight.shape)
        if kept.scaled:
            self.weight_scale = parameter(torch.float32, self.out_features, 1)
        if kept.lora_rank:
            self.lora_down = parameter(compute, kept.lora_rank, self.in_features)
            self.lora_up = parameter(compute, self.out_features, kept.lora_rank)

    @property
    def codes(self) -> Tensor:
        """The weight as it is kept."""
        return self.weight.view(torch.int8) if self.keeps_int8 else self.weight

    def unpacked_weight(self) -> Tensor:
        """The weight [out, in] in `compute_dtype`, rotated if it is kept so."""
        # Codes are exact in every wider type; the product is float32 inside and rounded once.
        weight = self.codes.to(self.compute_dtype)
        return weight if self.weight_scale is None else weight.mul_(self.weight_scale)

    def forward(self, x: LinearInput) -> Tensor:
        """x: [n, in], as tensors of any float type or, where products are fp8, as codes -> [n, out]."""
        if self.input_dtype == E4M3:
            x = fp8_tokens(x)
            product = _multiply if x.codes.is_cuda else _multiply_unpacked
            y = product(x, self.weight, self.weight_scale, self.bias, self.compute_dtype)
        else:
            assert isinstance(x, Tensor), "codes are made for the layers that multiply them"
            x = x.to(self.compute_dtype)
            group = self.kept.rotated_by if self.kept is not None else 0
            if self.int8_product is not None and not self.exact:
                y = self.int8_product(x, self.codes, self.weight_scale, self.bias, group)
            else:
                turned = rotate_inputs(x, group) if group else x
                y = F.linear(turned, self.unpacked_weight(), self.bias)
        if self.lora_down is None:
            return y
        if isinstance(x, Tensor):
            inner = F.linear(x, self.lora_down)
        else:
            # The scale of a token on its few products, not on all of its channels.
            inner = F.linear(x.codes.to(self.compute_dtype), self.lora_down).mul_(x.scale)
        return y.addmm_(inner, self.lora_up.t())


def fp8_tokens(x: LinearInput) -> Fp8Tokens:
    """x: [n, in] -> its codes with a scale per row."""
    return x if isinstance(x, Fp8Tokens) else Fp8Tokens(*quantise_rows(x.float(), E4M3))


def cast_tokens(x: LinearInput, dtype: torch.dtype) -> LinearInput:
    """x: [n, in] -> the same in `dtype`; E4M3: as codes with a scale per token."""
    if dtype == E4M3:
        return fp8_tokens(x)
    assert isinstance(x, Tensor), dtype
    return x.to(dtype)


def _multiply(x: Fp8Tokens, weight: Tensor, scale: Tensor | None, bias: Tensor | None, out: torch.dtype) -> Tensor:
    """On the GPU's fp8 units. The sums are float32, scaled, biased and rounded once, to bf16."""
    if scale is None:
        scale = torch.ones(weight.shape[0], 1, device=weight.device)
    bias = None if bias is None else bias.to(torch.bfloat16)
    # Adding up within the tensor cores is twice as fast; what it rounds is far below what the codes do.
    if hasattr(F, "scaled_mm"):
        rows = F.ScalingType.RowWise
        y = F.scaled_mm(
            x.codes, weight.t(), x.scale, rows, scale.t(), rows,
            bias=bias, output_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip
    else:
        # Before torch 2.10.
        y = torch._scaled_mm(
            x.codes, weight.t(), x.scale, scale.t(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return y.to(out)


def _multiply_unpacked(
    x: Fp8Tokens, weight: Tensor, scale: Tensor | None, bias: Tensor | None, out: torch.dtype
) -> Tensor:
    """The same arithmetic where there are no such units: products of fp8 codes are exact in float32."""
    y = F.linear(x.codes.float(), weight.float()) * x.scale
    if scale is not None:
        y = y * scale.t()
    return (y if bias is None else y + bias).to(out)
