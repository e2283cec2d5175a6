"""int8 with ConvRot or blocks, nvfp4, mxfp8 and fp8 by blocks: every value is what the codes and scales stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_formats import comfy_quant, is_quantised, quantised_layers
from ranks import run_ranks
from safetensors.torch import save_file
from tiny import random_weights
from torch import Tensor
from wan_pack.wan.checkpoint.checkpoint import Checkpoint
from wan_pack.wan.checkpoint.weights import empty_model, read_weights
from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.model.eight_bits import regular_hadamard

CONFIG = WanConfig(dim=256, ffn_dim=192, num_heads=2, num_layers=2, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)
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
        bigger = torch.zeros(4 * size, 4 * size)
        for i in range(4 * size):
            for j in range(4 * size):
                bigger[i, j] = matrix[i // 4, j // 4] * smallest[i % 4, j % 4]
        matrix = bigger
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
        values, codes = torch.empty_like(weight), torch.empty(weight.shape, dtype=dtype)
        for i in range(weight.shape[0]):
            for k in range(across):
                part = slice(k * columns, (k + 1) * columns)
                code = weight[i, part] / scales[i // rows, k]
                code = code.round().clamp(-127, 127) if dtype == torch.int8 else code.clamp(-448, 448)
                codes[i, part] = code.to(dtype)
                values[i, part] = codes[i, part].float() * scales[i // rows, k]
        extra = {"comfy_quant": comfy_quant(**says)} if says else {}
        return {"weight": codes, scale_name: scales} | extra, values

    return store


def tiled(scales: Tensor) -> Tensor:
    """By the drawing in cuBLAS' manual: the offset of each scale in its tile of 128 x 4."""
    rows, columns = scales.shape
    down, across = -(-rows // 128), -(-columns // 4)
    out = torch.zeros(down * across * 512, dtype=scales.dtype)
    for r in range(rows):
        for c in range(columns):
            tile = (r // 128) * across + c // 4
            out[tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4] = scales[r, c]
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


FORMATS: dict[str, Callable[[Tensor], Stored]] = {
    "int8 ConvRot": convrot(64), "int8 ConvRot, 4 inputs": convrot(4), "int8 ConvRot by tensor": convrot_by_tensor,
    "int8 by blocks": blocks(torch.int8, 1, 64, "weight_scale", format="int8_blockwise", group_size=64),
    "int8 by squares": blocks(torch.int8, 64, 64, "weight_scale", format="int8_blockwise", block_size=64),
    "fp8 by squares": blocks(torch.float8_e4m3fn, 128, 128, "weight_scale_inv"),
    "nvfp4": nvfp4, "mxfp8": mxfp8, "mxfp8, e8m0": lambda weight: mxfp8(weight, torch.float8_e8m0fnu),
    "quanto": quanto,
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


@pytest.mark.parametrize("kind", FORMATS)
def test_every_value_is_read(tmp_path: Path, kind: str):
    weights, path = random_weights(CONFIG), tmp_path / "m.safetensors"
    values = store(path, kind, weights)
    checkpoint = Checkpoint([path])
    assert not [name for name, weight in checkpoint.codes.items() if weight.dtype != torch.int8]
    model = empty_model(checkpoint, torch.float32).to_empty(device=CPU)
    read_weights(model, checkpoint, device=CPU)
    # A rotation is a sum of products; all else is one product, or two.
    close = {"rtol": 1e-5, "atol": 1e-6} if "ConvRot" in kind else {"rtol": 2**-22, "atol": 0.0}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.data, values[name], **close, msg=lambda m, n=name: f"{n}: {m}")
    assert sum(is_quantised(name, value) for name, value in values.items()) == len(quantised_layers(weights)) == 20


@pytest.mark.parametrize("kind", ["int8 ConvRot", "nvfp4", "mxfp8", "int8 by squares"])
def test_shards_and_merged_loras_have_the_rows_of_the_whole(tmp_path: Path, kind: str):
    """Three ranks, so that shards end within blocks of rows."""
    (tmp_path / "model").mkdir()
    store(tmp_path / "model" / "m.safetensors", kind, random_weights(CONFIG))
    lora = {"lora_A": torch.randn(4, 256) / 8, "lora_B": torch.randn(192, 4) / 8}
    save_file({f"blocks.0.ffn.0.{role}.weight": factor for role, factor in lora.items()}, tmp_path / "l.safetensors")
    loras = [(str(tmp_path / "l.safetensors"), 0.5)]
    results = run_ranks("merged_shards", 3, folder=str(tmp_path / "model"), loras=loras, mixed_precision="bf16")
    assert [result["blocks.0.self_attn.q.weight"] for result in results] == [86, 86, 84]


def test_the_usual_group_is_256(tmp_path: Path):
    config = WanConfig(dim=256, ffn_dim=256, num_heads=2, num_layers=1, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)
    weights, path = random_weights(config), tmp_path / "m.safetensors"
    name = "blocks.0.self_attn.q"
    stored, values = convrot(256, told=False)(weights[f"{name}.weight"])
    save_file(weights | {f"{name}.{part}": tensor for part, tensor in stored.items()}, path)
    out = torch.empty(256, 256)
    Checkpoint([path]).read_into(f"{name}.weight", out, staging=torch.empty(1 << 20, dtype=torch.uint8))
    torch.testing.assert_close(out, values, rtol=1e-5, atol=1e-6)


def test_a_block_scale_that_is_no_number_is_an_error(tmp_path: Path):
    weights, path = random_weights(CONFIG), tmp_path / "m.safetensors"
    stored, _ = mxfp8(weights["blocks.0.self_attn.q.weight"])
    stored["weight_scale"].view(-1)[0] = 255
    save_file(weights | {f"blocks.0.self_attn.q.{part}": tensor for part, tensor in stored.items()}, path)
    with pytest.raises(ValueError, match=r"m\.safetensors is damaged: a weight's scale"):
        Checkpoint([path]).read_into("blocks.0.self_attn.q.weight", torch.empty(256, 256))
