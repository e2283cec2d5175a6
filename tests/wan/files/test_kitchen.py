"""Files quantised by comfy-kitchen's own eager code, as ComfyUI writes them: read as comfy-kitchen dequantises them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_formats import comfy_quant, is_quantised, read_model
from safetensors.torch import save_file
from tiny import random_weights
from torch import Tensor
from wan_pack.wan.checkpoint.keeping import Keeping
from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.model.eight_bits import rotate_inputs

kitchen = pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed")

CONFIG = WanConfig(dim=256, ffn_dim=320, num_heads=2, num_layers=1, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)
Stored = tuple[dict[str, Tensor], Tensor]


def int8_rows(weight: Tensor) -> Stored:
    codes, scale = kitchen.quantize_int8_rowwise(weight)
    says = comfy_quant(format="int8_tensorwise", per_row=True)
    return {"weight": codes, "weight_scale": scale, "comfy_quant": says}, kitchen.dequantize_int8_simple(codes, scale)


def int8_tensor(weight: Tensor) -> Stored:
    codes, scale = kitchen.quantize_int8_tensorwise(weight)
    says = comfy_quant(format="int8_tensorwise")
    return {"weight": codes, "weight_scale": scale, "comfy_quant": says}, kitchen.dequantize_int8_simple(codes, scale)


def convrot(weight: Tensor) -> Stored:
    # The widths here are multiples of 64.
    codes, scale = torch.ops.comfy_kitchen.quantize_int8_convrot_weight(weight, 64)
    values = torch.ops.comfy_kitchen.dequantize_int8_convrot_weight(codes, scale, 64)
    says = comfy_quant(format="int8_tensorwise", convrot=True, convrot_groupsize=64)
    return {"weight": codes, "weight_scale": scale, "comfy_quant": says}, values


def mxfp8(weight: Tensor) -> Stored:
    codes, scales = kitchen.quantize_mxfp8(weight)
    values = kitchen.dequantize_mxfp8(codes, scales, torch.float32)
    return {"weight": codes, "weight_scale": scales, "comfy_quant": comfy_quant(format="mxfp8")}, values


def nvfp4(weight: Tensor) -> Stored:
    whole = weight.abs().max() / (448 * 6)
    codes, scales = kitchen.quantize_nvfp4(weight, whole)
    values = kitchen.dequantize_nvfp4(codes, whole, scales, torch.float32)
    says = comfy_quant(format="nvfp4")
    return {"weight": codes, "weight_scale": scales, "weight_scale_2": whole, "comfy_quant": says}, values


def fp8(weight: Tensor) -> Stored:
    scale = weight.abs().max() / 448
    codes = kitchen.quantize_per_tensor_fp8(weight, scale)
    values = kitchen.dequantize_per_tensor_fp8(codes, scale, torch.float32)
    return {"weight": codes, "weight_scale": scale, "comfy_quant": comfy_quant(format="float8_e4m3fn")}, values


@pytest.mark.parametrize("quantise", [int8_rows, int8_tensor, convrot, mxfp8, nvfp4, fp8])
def test_the_values_are_those_of_comfy_kitchen(tmp_path: Path, quantise: Callable[[Tensor], Stored]):
    tensors, values, path = {}, {}, tmp_path / "m.safetensors"
    for name, tensor in random_weights(CONFIG).items():
        if not is_quantised(name, tensor):
            tensors[name] = tensor
            continue
        stored, values[name] = quantise(tensor)
        tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in stored.items()}
    save_file(tensors, path)
    for keeping in (Keeping(), Keeping("int8")):
        model = read_model(path, torch.float32, keeping=keeping)
        for name, value in values.items():
            layer = model.get_submodule(name.removesuffix(".weight"))
            got = layer.unpacked_weight()
            if layer.kept is not None and layer.kept.rotated_by:
                got = rotate_inputs(got, layer.kept.rotated_by)
            rounded = layer.keeps_int8 and tensors[name].dtype != torch.int8
            close = {"rtol": 0.0, "atol": float(value.abs().max()) / 127} if rounded else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(got, value, **close, msg=lambda m, n=name: f"{n}: {m}")
