"""Matrices as quantised files of 2025 and 2026 store them, by plain arithmetic: codes, scales and what they mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from checkpoint_formats import comfy_quant, is_quantised
from safetensors.torch import save_file
from torch import Tensor
from wan_pack.wan.model.eight_bits import regular_hadamard

CPU = torch.device("cpu")
Stored = tuple[dict[str, Tensor], Tensor]
"""What is behind `X.weight` in its place, and the values."""


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


def convrot(group: int, told: bool = True) -> Callable[[Tensor], Stored]:
    """Rotated group by group with a matrix that is built here by its definition."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < group:
        size = matrix.shape[0]
        smallest = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
        i = torch.arange(4 * size)
        matrix = matrix[i // 4][:, i // 4] * smallest[i % 4][:, i % 4]
    matrix = matrix / group**0.5

    def store(weight: Tensor) -> Stored:
        whole = torch.block_diag(*[matrix] * (weight.shape[1] // group))
        codes, scale = int8_rows(weight @ whole.T)
        size = {"convrot_groupsize": group} if told else {}
        says = comfy_quant(format="int8_tensorwise", convrot=True, per_row=True, **size)
        return {"weight": codes, "weight_scale": scale, "comfy_quant": says}, (codes.float() * scale) @ whole

    return store


def convrot_by_tensor(weight: Tensor) -> Stored:
    stored, _ = convrot(16)(weight)
    stored["weight_scale"] = torch.tensor(0.013)
    whole = torch.block_diag(*[regular_hadamard(16, CPU, torch.float32)] * (weight.shape[1] // 16))
    return stored, 0.013 * stored["weight"].float() @ whole


def blocks(dtype: torch.dtype, rows: int, columns: int, scale_name: str, **says: object) -> Callable[[Tensor], Stored]:
    def store(weight: Tensor) -> Stored:
        down, across = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
        scales = torch.rand(down, across, generator=torch.Generator().manual_seed(1)) / 50 + 0.01
        i, j = (torch.arange(size) for size in weight.shape)
        own = scales[i // rows][:, j // columns]
        codes = weight / own
        codes = (codes.round().clamp(-127, 127) if dtype == torch.int8 else codes.clamp(-448, 448)).to(dtype)
        extra = {"comfy_quant": comfy_quant(**says)} if says else {}
        return {"weight": codes, scale_name: scales} | extra, codes.float() * own

    return store


def tiled(scales: Tensor) -> Tensor:
    """By the drawing in cuBLAS' manual: the offset of each scale in its tile of 128 x 4."""
    rows, columns = scales.shape
    down, across = -(-rows // 128), -(-columns // 4)
    out = torch.zeros(down * across * 512, dtype=scales.dtype)
    r, c = torch.arange(rows)[:, None], torch.arange(columns)
    tile = (r // 128) * across + c // 4
    out[tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4] = scales
    return out.view(down * 128, across * 4)


def mxfp8(weight: Tensor, dtype: torch.dtype = torch.uint8) -> Stored:
    exponents = torch.randint(
        118, 124, (weight.shape[0], weight.shape[1] // 32), generator=torch.Generator().manual_seed(2)
    )
    factors = (2.0 ** (exponents - 127)).repeat_interleave(32, dim=1)
    codes = (weight / factors).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = tiled(exponents.to(torch.uint8))
    return {"weight": codes, "weight_scale": scales.view(dtype), "comfy_quant": comfy_quant(format="mxfp8")}, (
        codes.float() * factors
    )


MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def nvfp4(weight: Tensor) -> Stored:
    whole = 0.003
    scales = (
        torch.rand(weight.shape[0], weight.shape[1] // 16, generator=torch.Generator().manual_seed(3)) * 8 + 1
    ).to(torch.float8_e4m3fn)
    factors = (scales.float() * whole).repeat_interleave(16, dim=1)
    codes = (weight.abs()[..., None] / factors[..., None] - MAGNITUDES).abs().argmin(-1)
    values = MAGNITUDES[codes] * weight.sign() * factors
    codes = codes + 8 * (weight < 0)
    packed = (codes[:, 0::2] * 16 + codes[:, 1::2]).to(torch.uint8)
    return {
        "weight": packed, "weight_scale": tiled(scales.float()).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(whole), "comfy_quant": comfy_quant(format="nvfp4"),
        "input_scale": torch.tensor(1.0),
    }, values  # fmt: skip


def quanto(weight: Tensor) -> Stored:
    codes, scale = int8_rows(weight)
    return {"weight._data": codes, "weight._scale": scale}, codes.float() * scale


def int4_convrot(weight: Tensor) -> Stored:
    """As comfy-kitchen's convrot_w4a4: int4 of -7 to 7 by rows, the first of two in the low bits."""
    whole = torch.block_diag(*[regular_hadamard(16, CPU, torch.float32)] * (weight.shape[1] // 16))
    turned = weight @ whole
    scale = turned.abs().amax(1, keepdim=True) / 7
    codes = (turned / scale).round()
    nibbles = torch.where(codes < 0, codes + 16, codes).to(torch.uint8)
    packed = (nibbles[:, 0::2] + 16 * nibbles[:, 1::2]).view(torch.int8)
    says = comfy_quant(format="convrot_w4a4", convrot_groupsize=16, quant_group_size=64, linear_dtype="int4")
    return {"weight": packed, "weight_scale": scale.view(-1), "comfy_quant": says}, (codes * scale) @ whole


def w4a8(weight: Tensor) -> Stored:
    """As comfy-kitchen's w4a8: the nearest of 16 levels by groups, the first of two places in the low bits."""
    whole = torch.block_diag(*[regular_hadamard(16, CPU, torch.float32)] * (weight.shape[1] // 16))
    levels = torch.linspace(-1, 1, 16) ** 3
    parts = (weight @ whole).unflatten(1, (-1, 16))
    rows = parts.abs().amax((1, 2)) / 127
    groups = (parts.abs().amax(2) / rows[:, None]).to(torch.float8_e4m3fn)
    factors = (groups.float() * rows[:, None])[..., None]
    places = ((parts / factors)[..., None] - levels).abs().argmin(-1)
    codes = (levels[places] * groups.float()[..., None]).round().clamp(-127, 127).flatten(1)
    places = places.flatten(1).to(torch.uint8)
    packed = (places[:, 0::2] + 16 * places[:, 1::2]).view(torch.int8)
    return {
        "weight": packed, "weight_s_rel": groups, "weight_s_channel": rows, "weight_codebook": levels,
        "comfy_quant": comfy_quant(format="asym_w4a8_int8", group_size=16, convrot_groupsize=16),
    }, (codes * rows[:, None]) @ whole  # fmt: skip


def torchao(dtype: torch.dtype) -> Callable[[Tensor], Stored]:
    def store(weight: Tensor) -> Stored:
        codes, scale = int8_rows(weight)
        if dtype != torch.int8:
            codes, scale = (weight / (scale * 127 / 448)).to(dtype), scale * 127 / 448
        return {"_weight_qdata": codes, "_weight_scale": scale}, codes.float() * scale

    return store


FORMATS: dict[str, Callable[[Tensor], Stored]] = {
    "int8 ConvRot": convrot(64), "int8 ConvRot, 4 inputs": convrot(4), "int8 ConvRot by tensor": convrot_by_tensor,
    "int8 by blocks": blocks(torch.int8, 1, 64, "weight_scale", format="int8_blockwise", group_size=64),
    "int8 by squares": blocks(torch.int8, 64, 64, "weight_scale", format="int8_blockwise", block_size=64),
    "fp8 by squares": blocks(torch.float8_e4m3fn, 128, 128, "weight_scale_inv"),
    "nvfp4": nvfp4, "mxfp8": mxfp8, "mxfp8, e8m0": lambda weight: mxfp8(weight, torch.float8_e8m0fnu),
    "int4 ConvRot": int4_convrot, "w4a8": w4a8, "quanto": quanto,
    "torchao": torchao(torch.int8), "torchao fp8": torchao(torch.float8_e4m3fn),
}  # fmt: skip


def store(path: Path, kind: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the values."""
    tensors, values = {}, {}
    for name, tensor in weights.items():
        if not is_quantised(name, tensor):
            tensors[name] = values[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        stored, values[name] = FORMATS[kind](tensor)
        tensors |= {f"{layer}.{part}": value for part, value in stored.items()}
    save_file(tensors, path)
    return values
