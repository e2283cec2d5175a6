"""One transformer of one head in one file: writes it, loads it, and sees it refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from wan_pack.wan.checkpoint.checkpoint import Checkpoint, checkpoint_files
from wan_pack.wan.checkpoint.weights import read_weights
from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.transformer.transformer import meta_model

SINGLE = WanConfig(dim=128, ffn_dim=80, num_heads=1, num_layers=2, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)
"""One head of 128 channels: what a file without a config.json must have."""


def loaded(path: Path, compute: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The checkpoint's values; fp8 is unpacked, as the model has no fp8 weights."""
    checkpoint = Checkpoint(checkpoint_files(path))
    model = meta_model(checkpoint.config, compute).to_empty(device="cpu")
    read_weights(model, checkpoint, device=torch.device("cpu"))
    return model.state_dict()


def single_file(path: Path, weights: dict[str, torch.Tensor], prefix: str = "") -> Path:
    save_file({prefix + name: tensor for name, tensor in weights.items()}, path)
    return path


def refused(path: Path, tensors: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        Checkpoint([single_file(path, tensors)])
    assert str(path) in str(caught.value)
