"""The trained model's files: ComfyUI's single-file layout in float16, in ComfyUI's model folders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path

import torch
from torch import Tensor

from ...wan.checkpoint.checkpoint import Checkpoint
from ..example import TinyModel
from .batched import BatchedModel

MAX_FILE = 14 << 20
MAX_ALL = 40 << 20
NAMES = TinyModel(
    high_noise="shapes_t2v_high_noise.safetensors",
    low_noise="shapes_t2v_low_noise.safetensors",
    vae="shapes_vae.safetensors",
    text_encoder="shapes_umt5.safetensors",
    i2v_high_noise="shapes_i2v_high_noise.safetensors",
    i2v_low_noise="shapes_i2v_low_noise.safetensors",
    high_noise_lora="shapes_t2v_4steps_lora_high_noise.safetensors",
    low_noise_lora="shapes_t2v_4steps_lora_low_noise.safetensors",
)
FOLDERS = {"vae": "vae", "umt5": "text_encoders", "lora": "loras"}
"""Part of a file's name -> ComfyUI's folder for it; the others are diffusion_models."""


def place(models: Path, name: str) -> Path:
    """Where a file of `NAMES` lies."""
    return models / next((to for part, to in FOLDERS.items() if part in name), "diffusion_models") / name


def trained(models: Path) -> list[Path]:
    """The files that are there."""
    names = [name for name in astuple(NAMES) if name.startswith("shapes_")]
    return [path for name in names if (path := place(models, name)).is_file()]


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes float tensors as float16, others as they are; whole or not at all.

    Raises:
        ValueError: a value does not fit float16, or the file would be too large for the repository.
    """
    from safetensors.torch import save_file

    halves = {}
    for name, tensor in tensors.items():
        half = tensor.detach().half() if tensor.is_floating_point() else tensor
        if half.is_floating_point() and not half.isfinite().all():
            raise ValueError(f"{path.name}: {name} reaches {tensor.abs().max():g}; it must be below 65504")
        halves[name] = half.cpu().contiguous()
    size = sum(tensor.nbytes for tensor in halves.values())
    if size > MAX_FILE:
        raise ValueError(f"{path.name} would have {size} bytes; it must have at most {MAX_FILE}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    save_file(halves, partial)
    os.replace(partial, path)


def read_expert(path: Path, device: torch.device) -> BatchedModel:
    """A transformer for training, float32, by the pack's own reader."""
    checkpoint = Checkpoint([path])
    model = BatchedModel(checkpoint.config)
    staging = torch.empty(1 << 20, dtype=torch.uint8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            checkpoint.read_into(name, parameter.data, staging=staging)
    return model.to(device)
