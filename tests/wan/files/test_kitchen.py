"""Files quantised by comfy-kitchen's own eager code, as ComfyUI writes them: read as comfy-kitchen dequantises them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def int4_convrot(weight: Tensor) -> Stored:
    codes, scale = kitchen.quantize_convrot_w4a4_weight(weight, 64, 64)
    values = kitchen.dequantize_convrot_w4a4_weight(codes, scale, 64, 64, torch.float32)
    says = comfy_quant(format="convrot_w4a4", convrot_groupsize=64)
    return {"weight": codes, "weight_scale": scale, "comfy_quant": says}, values


def w4a8(weight: Tensor, group: int = 16, **how: Any) -> Stored:
    codes, groups, rows, _, table = kitchen.quantize_w4a8_int8_weight(weight, group, 64, **how)
    values = kitchen.dequantize_w4a8_int8_weight(codes, groups, rows, table, None, group, 64, torch.float32)
    says = comfy_quant(format="asym_w4a8_int8", convrot_groupsize=64, **({"group_size": group} if group != 16 else {}))
    stored = {"weight": codes, "weight_s_rel": groups, "weight_s_channel": rows, "comfy_quant": says}
    return stored | ({} if table is None else {"weight_codebook": table}), values


def w4a8_of_other_groups(weight: Tensor) -> Stored:
    """Without a table, as bytes and in float32."""
    stored, values = w4a8(weight, 32, codebook=False, scale_dtype=torch.float32)
    return stored | {"weight": stored["weight"].view(torch.uint8)}, values


def w4a8_of_bytes(weight: Tensor) -> Stored:
    stored, values = w4a8(weight, 8)
    return stored | {"weight_s_rel": stored["weight_s_rel"].view(torch.uint8)}, values


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


FORMATS = (
    *(int8_rows, int8_tensor, convrot, int4_convrot, mxfp8, nvfp4, fp8),
    *(w4a8, w4a8_of_other_groups, w4a8_of_bytes),
)


@pytest.mark.parametrize("quantise", FORMATS)
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
            whole = tensors[name].dtype == torch.int8 and tensors[name].shape == value.shape
            # Its codes become int8 as comfy-kitchen's do before they are multiplied.
            whole |= quantise.__name__.startswith("w4a8")
            rounded = layer.keeps_int8 and not whole
            close = {"rtol": 0.0, "atol": float(value.abs().max()) / 127} if rounded else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(got, value, **close, msg=lambda m, n=name: f"{n}: {m}")


def changed(**parts: Tensor | None) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda stored: {name: t for name, t in (stored | parts).items() if t is not None}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed(weight_s_rel=None), r"groups of 16 inputs, .*: .*weight_s_rel missing, .*_codebook \[16\]"),
        (changed(weight_s_channel=None), r"weight_s_channel missing"),
        (changed(weight_s_rel=None, weight_codebook=None), r"_s_rel missing, .*_channel \[256\], .*_codebook missing"),
        (changed(comfy_quant=None), r"is int8 without a scale"),
        (changed(comfy_quant=comfy_quant(format="asym_w4a8_int8", zero_point=3)), r"as asym_w4a8_int8 zero_point"),
        (changed(weight_correction=torch.ones(16, 256)), r"as w4a8 with zero points \(.*_correction\)"),
        (changed(weight=torch.ones(256, 192, dtype=torch.int8)), r"_int8 with codes of 6 bits; this"),
        (changed(weight_s_rel=torch.ones(256, 8)), r"weight_s_rel \[256, 8\]"),
        (changed(weight_s_channel=torch.ones(255)), r"weight_s_channel \[255\]"),
        (changed(weight_s_channel=torch.ones(256, dtype=torch.uint8)), r"it has no such"),
        (changed(weight_codebook=torch.ones(8)), r"weight_codebook \[8\]"),
        (changed(weight=torch.ones(256, 128)), r"it has no such"),
        (changed(comfy_quant=comfy_quant(format="asym_w4a8_int8", group_size=2)), r"of 2 inputs"),
        (changed(comfy_quant=comfy_quant(format="asym_w4a8_int8", group_size=24)), r"of 24 inputs"),
        (changed(comfy_quant=comfy_quant(format="asym_w4a8_int8", convrot_groupsize=1024)), r"by groups of 1024"),
    ],
)  # fmt: skip
def test_w4a8_whose_parts_do_not_fit_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: str
):
    from wan_pack.wan.checkpoint.checkpoint import Checkpoint

    tensors, name, path = random_weights(CONFIG), "blocks.0.self_attn.q", tmp_path / "m.safetensors"
    stored = change(w4a8(tensors.pop(f"{name}.weight"))[0])
    save_file(tensors | {f"{name}.{part}": value for part, value in stored.items()}, path)
    with pytest.raises(ValueError, match=words) as refusal:
        Checkpoint([path])
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("part", ["weight_s_rel", "weight_s_channel", "weight_codebook"])
def test_w4a8_with_a_scale_that_is_no_number_is_damaged(tmp_path: Path, part: str):
    from wan_pack.wan.checkpoint.checkpoint import Checkpoint

    tensors, name, path = random_weights(CONFIG), "blocks.0.self_attn.q", tmp_path / "m.safetensors"
    stored = w4a8(tensors.pop(f"{name}.weight"))[0]
    stored[part] = stored[part].float().index_fill(0, torch.tensor([3]), torch.nan).to(stored[part].dtype)
    save_file(tensors | {f"{name}.{part}": value for part, value in stored.items()}, path)
    with pytest.raises(ValueError, match="is damaged: a weight's scale is not a finite number"):
        Checkpoint([path]).read_into(f"{name}.weight", torch.empty(256, 256))


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_matrices_that_were_padded_are_read_at_their_own_size(tmp_path: Path, kind: str, told: bool, plain: bool):
    """72 rows and inputs are no whole tiles; the scales lie in tiles, or in rows as long as these."""
    from comfy_kitchen.float_utils import from_blocked
    from wan_pack.wan.checkpoint.checkpoint import Checkpoint

    config = WanConfig(dim=128, ffn_dim=72, num_heads=1, num_layers=1, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)
    weights, path = random_weights(config), tmp_path / "m.safetensors"
    tensors, values = dict(weights), {}
    for name in ("blocks.0.ffn.0.weight", "blocks.0.ffn.2.weight", "blocks.0.self_attn.q.weight"):
        weight = weights[name]
        if kind == "nvfp4":
            whole = weight.abs().max() / (448 * 6)
            codes, scales = kitchen.quantize_nvfp4(weight, whole, pad_16x=True)
            value, block = kitchen.dequantize_nvfp4(codes, whole, scales, torch.float32), 16
            stored = {"weight": codes, "weight_scale_2": whole}
        else:
            codes, scales = kitchen.quantize_mxfp8(weight, pad_32x=True)
            value, block = kitchen.dequantize_mxfp8(codes, scales, torch.float32), 32
            stored = {"weight": codes}
        values[name] = value[: weight.shape[0], : weight.shape[1]]
        if plain and "ffn" in name:
            scales = from_blocked(scales, value.shape[0], value.shape[1] // block).contiguous()
        says = comfy_quant(format=kind, **({"orig_shape": list(weight.shape)} if told else {}))
        stored |= {"weight_scale": scales.view(torch.uint8) if kind == "mxfp8" else scales, "comfy_quant": says}
        tensors |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in stored.items()}
        assert value.shape != weight.shape or "q" in name
    save_file(tensors, path)
    model = read_model(path, torch.float32)
    for name, value in values.items():
        torch.testing.assert_close(model.get_parameter(name).data, value, rtol=1e-5, atol=1e-6)
    # Rows of a shard.
    part = torch.empty(7, 72)
    Checkpoint([path]).read_into("blocks.0.ffn.2.weight", part, start=30 * 72)
    torch.testing.assert_close(part, values["blocks.0.ffn.2.weight"][30:37], rtol=1e-5, atol=1e-6)
