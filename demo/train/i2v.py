"""Part "i2v": the image-to-video experts, which begin as the text-to-video ones and learn to read the given frame."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ...wan.vae.autoencoder import load_vae
from . import small_umt5
from .batched import BatchedModel
from .clip_pool import Pool
from .dit import T2V, Task, expert_losses
from .loop import Budget, fit
from .sizes import Sizes
from .trained_files import NAMES, place, read_expert, write

I2V = Task(shift=5.0, boundary=0.9, files=(NAMES.i2v_high_noise, NAMES.i2v_low_noise))
IN_DIM = 36


def train(folder: Path, sizes: Sizes, budget: Budget, device: torch.device) -> None:
    """Trains both and writes their files. Needs the files of the parts "vae" and "dit"; the text encoder stays."""
    encoder = small_umt5.load(folder, device)
    encoder.model.requires_grad_(False)
    experts = nn.ModuleList()
    for name, start in zip(I2V.files, T2V.files, strict=True):
        own = place(folder, name)
        experts.append(read_expert(own, device) if own.exists() else widened(read_expert(place(folder, start), device)))
    pool = Pool(load_vae([place(folder, NAMES.vae)], device=device), encoder.tokenizer, sizes, device, with_image=True)
    losses = expert_losses(I2V, experts, encoder.model, pool, sizes)
    fit("i2v", experts, losses, folder=folder, budget=budget, learning_rate=sizes.learning_rate, warm_up=sizes.warm_up)
    for name, model in zip(I2V.files, experts, strict=True):
        write(place(folder, name), model.state_dict())


def widened(model: BatchedModel) -> BatchedModel:
    """The same with twenty more channels in, which it does not look at yet."""
    wide = BatchedModel(replace(model.config, in_dim=IN_DIM)).to(model.head.modulation.device)
    tensors = dict(model.state_dict())
    narrow = tensors["patch_embedding.weight"]
    more = narrow.new_zeros(narrow.shape[0], IN_DIM - narrow.shape[1], *narrow.shape[2:])
    tensors["patch_embedding.weight"] = torch.cat((narrow, more), dim=1)
    wide.load_state_dict(tensors)
    return wide
