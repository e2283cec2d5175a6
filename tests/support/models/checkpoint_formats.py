"""One set of transformer weights, written in every file format. Each writer returns the values the file stands for.

Quantised are the matrices of the blocks, as in the released files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from wan_pack.wan.checkpoint.checkpoint import Checkpoint
from wan_pack.wan.checkpoint.keeping import MERGED, Keeping
from wan_pack.wan.checkpoint.weights import empty_model, read_weights
from wan_pack.wan.files.diffusers_keys import to_official
from wan_pack.wan.lora.lora import Lora
from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.transformer.transformer import WanModel

Weights = dict[str, Tensor]
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}


def is_quantised(name: str, tensor: Tensor) -> bool:
    return name.startswith(("blocks.", "vace_blocks.")) and tensor.dim() == 2


def write_plain_fp8(path: Path, weights: Weights, dtype: torch.dtype, prefix: str = "") -> Weights:
    tensors = {name: t.to(dtype) if is_quantised(name, t) else t for name, t in weights.items()}
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path)
    return {name: tensor.float() for name, tensor in tensors.items()}


def write_scaled(
    path: Path,
    weights: Weights,
    dtype: torch.dtype,
    *,
    scale: str,
    per_row: bool,
    prefix: str = "",
    extra: Weights | None = None,
    metadata: dict[str, str] | None = None,
) -> Weights:
    """fp8 or int8 codes; `scale` is what the scale's tensor is called, behind its layer."""
    tensors, values = dict(extra or {}), {}
    for name, tensor in weights.items():
        if not is_quantised(name, tensor):
            tensors[name] = values[name] = tensor
            continue
        amax = tensor.abs().amax(dim=1, keepdim=True) if per_row else tensor.abs().amax()
        factor = amax / LARGEST[dtype]
        codes = tensor / factor
        codes = (codes.round() if dtype == torch.int8 else codes).to(dtype)
        tensors |= {name: codes, f"{name.removesuffix('.weight')}.{scale}": factor}
        values[name] = codes.float() * factor
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path, metadata=metadata)
    return values


def write_fp8(path: Path, weights: Weights, kind: str, dtype: torch.dtype) -> Weights:
    """kind: plain, or what the scale is called, "by tensor" or "by row"."""
    if kind == "plain":
        return write_plain_fp8(path, weights, dtype)
    scale, _, by = kind.partition(" by ")
    return write_scaled(path, weights, dtype, scale=scale, per_row=by == "row")


def read_model(path: Path, compute: torch.dtype, loras: Sequence[Lora] = (), keeping: Keeping = MERGED) -> WanModel:
    """As one process loads it."""
    checkpoint, cpu = Checkpoint([path]), torch.device("cpu")
    model = empty_model(checkpoint, compute, loras, keeping).to_empty(device=cpu)
    read_weights(model, checkpoint, device=cpu, loras=loras)
    return model


def comfy_quant(**entries: object) -> Tensor:
    """The bytes of a layer's `comfy_quant` tensor."""
    return torch.frombuffer(bytearray(json.dumps(entries).encode()), dtype=torch.uint8)


def quantised_layers(weights: Weights) -> list[str]:
    return [name.removesuffix(".weight") for name, tensor in weights.items() if is_quantised(name, tensor)]


def diffusers_names(config: WanConfig) -> dict[str, str]:
    """Official name -> diffusers' name, from the names of diffusers' own model."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=config.num_heads, attention_head_dim=config.head_dim, in_channels=config.in_dim,
            out_channels=config.out_dim, text_dim=config.text_dim, freq_dim=config.freq_dim, ffn_dim=config.ffn_dim,
            num_layers=config.num_layers, cross_attn_norm=True,
        )  # fmt: skip
    return {to_official(name): name for name, _ in model.named_parameters()}


def write_diffusers(folder: Path, weights: Weights, config: WanConfig, shards: int) -> Weights:
    folder.mkdir()
    settings = {"_class_name": "WanTransformer3DModel", "num_attention_heads": config.num_heads}
    (folder / "config.json").write_text(json.dumps(settings))
    names = diffusers_names(config)
    tensors = {names[name]: tensor for name, tensor in weights.items()}
    weight_map = {}
    for i in range(shards):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-{shards:05}.safetensors"
        part = sorted(tensors)[i::shards]
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return weights


def write_gguf(path: Path, weights: Weights, type_name: str, prefix: str = "") -> Weights:
    """As ComfyUI-GGUF's converter: small tensors in F32, a matrix that blocks do not fit reshaped to rows of 256."""
    import gguf

    kind = gguf.GGMLQuantizationType[type_name]
    block = gguf.GGML_QUANT_SIZES[kind][0]
    writer = gguf.GGUFWriter(path, "wan")
    values = {}
    for name, tensor in weights.items():
        data = tensor.numpy()
        if not is_quantised(name, tensor):
            writer.add_tensor(prefix + name, data)
            values[name] = tensor
            continue
        if data.shape[-1] % block:
            writer.add_array(f"comfy.gguf.orig_shape.{prefix}{name}", data.shape)
            data = data.reshape(-1, 256)
        packed = gguf.quants.quantize(data, kind)
        writer.add_tensor(prefix + name, packed, raw_dtype=kind)
        values[name] = torch.from_numpy(gguf.quants.dequantize(packed, kind).reshape(tensor.shape).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values
