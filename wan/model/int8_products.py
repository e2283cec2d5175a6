"""Products of int8 by int8, where a package has them: weights that are kept so are else unpacked for each use."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .linear import Linear

PACKAGES = ("comfy_kitchen", "packaging")
"""The second is imported by the first, which does not declare it."""

Int8Product = Callable[[Tensor, Tensor, Tensor, Tensor | None, int], Tensor]
"""(x [n, in] of a float type, codes [out, in] int8, scale [out, 1], bias, `rotated_by`) -> [n, out], dtype of x."""


def int8_products_there() -> bool:
    """Whether comfy-kitchen is installed."""
    return all(importlib.util.find_spec(package) is not None for package in PACKAGES)


def use_int8_products(model: nn.Module) -> int:
    """Lets the layers that keep int8 codes multiply them by activations that are rounded to int8, token by token.

    Returns how many do; 0 if comfy-kitchen is not installed.
    """
    if not int8_products_there():
        return 0
    layers = [module for module in model.modules() if isinstance(module, Linear) and module.keeps_int8]
    for layer in layers:
        layer.int8_product = kitchen_product()
    return len(layers)


@functools.cache
def kitchen_product() -> Int8Product:
    """comfy-kitchen's, which rotates and rounds the activations itself, as one operation of a compiled graph."""

    def multiply(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, rotated_by: int) -> Tensor:
        from comfy_kitchen import int8_linear

        rotation = {"convrot": True, "convrot_groupsize": rotated_by} if rotated_by else {}
        y: Tensor = int8_linear(x, codes, scale, bias=bias, out_dtype=x.dtype, **rotation)
        return y

    def shaped(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, rotated_by: int) -> Tensor:
        return x.new_empty(x.shape[0], codes.shape[0])

    product = torch.library.custom_op(
        "wan_distributed::int8_linear", multiply, mutates_args=(),
        schema="(Tensor x, Tensor codes, Tensor scale, Tensor? bias, int rotated_by) -> Tensor",
    )  # fmt: skip
    product.register_fake(shaped)
    return product
