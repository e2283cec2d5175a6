"""CLIP's vision model in small, random, as each of those who save it names its tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

LAYERS, FFN_DIM = 3, 64
ROWS = 257
_PARTS = {
    "layer_norm1": ("ln_1", "norm1"),
    "self_attn.out_proj": ("attn.out_proj", "attn.proj"),
    "layer_norm2": ("ln_2", "norm2"),
    "mlp.fc1": ("mlp.c_fc", "mlp.0"),
    "mlp.fc2": ("mlp.c_proj", "mlp.2"),
}


def config(dim: int) -> dict[str, object]:
    """As transformers and ComfyUI take it."""
    return {
        "hidden_size": dim, "intermediate_size": FFN_DIM, "num_hidden_layers": LAYERS, "num_attention_heads": 16,
        "num_channels": 3, "image_size": 224, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
        "projection_dim": 32, "model_type": "clip_vision_model",
    }  # fmt: skip


def clip_weights(seed: int = 0, dim: int = 64) -> dict[str, Tensor]:
    """transformers' names, as clip_vision_h.safetensors has them; numbers that float16 holds, as it does.

    ComfyUI keeps them so on a CPU too.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    state = {
        "embeddings.class_embedding": normal(dim, scale=1.0),
        "embeddings.patch_embedding.weight": normal(dim, 3, 14, 14, scale=0.05),
        "embeddings.position_embedding.weight": normal(ROWS, dim, scale=0.5),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        state |= {f"{norm}.weight": 1 + normal(dim, scale=0.2), f"{norm}.bias": normal(dim, scale=0.2)}
    for layer in range(LAYERS):
        stem = f"encoder.layers.{layer}."
        for norm in ("layer_norm1", "layer_norm2"):
            state[f"{stem}{norm}.weight"] = 1 + normal(dim, scale=0.2)
            state[f"{stem}{norm}.bias"] = normal(dim, scale=0.2)
        linear = {f"self_attn.{part}_proj": (dim, dim) for part in ("q", "k", "v", "out")}
        for name, (rows, columns) in {**linear, "mlp.fc1": (FFN_DIM, dim), "mlp.fc2": (dim, FFN_DIM)}.items():
            state[f"{stem}{name}.weight"] = normal(rows, columns, scale=1.5 * columns**-0.5)
            state[f"{stem}{name}.bias"] = normal(rows, scale=0.1)
    named = {f"vision_model.{name}": tensor for name, tensor in state.items()}
    named["visual_projection.weight"] = normal(32, dim, scale=0.1)
    return {name: tensor.half().float() for name, tensor in named.items()}


def as_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As open_clip_pytorch_model.bin has them, beside a text tower."""
    whole = {
        "embeddings.class_embedding": "class_embedding", "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.position_embedding.weight": "positional_embedding", "pre_layrnorm": "ln_pre",
        "post_layernorm": "ln_post",
    }  # fmt: skip
    made = _renamed(weights, whole, "transformer.resblocks", 0, ("attn.in_proj_weight", "attn.in_proj_bias"))
    text = {
        "positional_embedding": torch.zeros(77, 8),
        "transformer.resblocks.0.attn.in_proj_weight": torch.ones(24, 8),
    }
    return {f"visual.{name}": tensor for name, tensor in made.items()} | text


def as_official(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth has them."""
    whole = {
        "embeddings.class_embedding": "cls_embedding", "embeddings.patch_embedding.weight": "patch_embedding.weight",
        "embeddings.position_embedding.weight": "pos_embedding", "pre_layrnorm": "pre_norm",
        "post_layernorm": "post_norm",
    }  # fmt: skip
    made = _renamed(weights, whole, "transformer", 1, ("attn.to_qkv.weight", "attn.to_qkv.bias"))
    made["cls_embedding"] = made["cls_embedding"].view(1, 1, -1)
    made["pos_embedding"] = made["pos_embedding"][None]
    return {f"visual.{name}": tensor for name, tensor in made.items()} | {"log_scale": torch.ones(())}


def _renamed(
    weights: dict[str, Tensor], whole: dict[str, str], blocks: str, column: int, together: tuple[str, str]
) -> dict[str, Tensor]:
    made = {}
    for name, tensor in weights.items():
        if not name.startswith("vision_model."):
            continue
        name = name.removeprefix("vision_model.")
        if name in whole:
            made[whole[name]] = tensor
        elif name.partition(".")[0] in whole:
            made[whole[name.partition(".")[0]] + "." + name.partition(".")[2]] = tensor
        else:
            layer, module = name.removeprefix("encoder.layers.").split(".", 1)
            module, leaf = module.rsplit(".", 1)
            if module in _PARTS:
                made[f"{blocks}.{layer}.{_PARTS[module][column]}.{leaf}"] = tensor
    for layer in range(LAYERS):
        for leaf, joined in zip(("weight", "bias"), together, strict=True):
            stem = f"vision_model.encoder.layers.{layer}.self_attn."
            made[f"{blocks}.{layer}.{joined}"] = torch.cat([weights[f"{stem}{part}_proj.{leaf}"] for part in "qkv"])
    return made


def write_clip(path: Path, *, seed: int = 0, dim: int = 64) -> Path:
    save_file(clip_weights(seed, dim), path)
    return path
