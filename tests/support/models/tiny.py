"""Small transformers with random weights, written as checkpoints."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.model.variants import VARIANTS
from wan_pack.wan.transformer.transformer import WanModel

TINY = WanConfig(
    dim=32, ffn_dim=80, num_heads=4, num_layers=2, in_dim=16, out_dim=16, text_dim=48, freq_dim=32
)  # fmt: skip
TINY_VACE = replace(TINY, num_layers=5, parts=frozenset({"vace_blocks"}), vace_layers=(0, 3))
"""With control blocks that are spread unevenly over the others."""
TINY_ANIMATE = replace(
    TINY, in_dim=36, num_layers=6, parts=VARIANTS["Animate"].parts, clip_dim=64, motion_dim=32, face_dim=16,
    face_blocks=2,
)  # fmt: skip
"""With attention to a face behind the first main block and the last one."""
GRID = (3, 3, 5)
"""Latent frames, token rows and columns of a small video: 45 tokens, which few numbers of ranks divide."""


def random_weights(config: WanConfig = TINY, seed: int = 0, scale: float = 0.1) -> dict[str, Tensor]:
    """Official name -> float32 tensor."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * scale for name, shape in _shapes(config).items()}


@functools.cache
def _shapes(config: WanConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in WanModel(config).named_parameters()}


def write_official(folder: Path, weights: dict[str, Tensor], config: WanConfig = TINY, shards: int = 1) -> Path:
    """config.json and safetensors in the official folder layout. Returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    says = {"_class_name": "WanModel", "num_heads": config.num_heads}
    if config.vace_layers:
        says |= {"_class_name": "VaceWanModel", "vace_layers": list(config.vace_layers)}
    (folder / "config.json").write_text(json.dumps(says))
    names = sorted(weights)
    parts = [names[i::shards] for i in range(shards)]
    if shards == 1:
        save_file(weights, folder / "diffusion_pytorch_model.safetensors")
        return folder
    weight_map = {}
    for i, part in enumerate(parts, start=1):
        file = f"diffusion_pytorch_model-{i:05}-of-{shards:05}.safetensors"
        save_file({name: weights[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder
