"""Damaged files, 20,000 in `make soak`: each is opened or refused by name, in no time and no memory to speak of.

These are the functions that a user's file goes through inside ComfyUI, before any process starts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_formats import comfy_quant, quantised_layers, write_gguf, write_scaled
from lora_families import FAMILIES, TARGETS
from mount import GOLDEN
from mutations import Mutate, Open, mutate_head, mutate_safetensors, mutate_text, mutate_zip, try_mutations
from safetensors.torch import load_file, save_file
from tiny import TINY, random_weights, write_official
from umt5 import MODEL, gguf_tokenizer, hf_weights, train_spiece, wide_hf_weights
from umt5 import write_gguf as write_text_encoder_gguf
from wan_pack.wan.checkpoint.checkpoint import Checkpoint, checkpoint_files
from wan_pack.wan.files.model_folder import folder_files
from wan_pack.wan.files.stored_model import _open_file
from wan_pack.wan.lora.lora import Lora
from wan_pack.wan.text.t5_keys import EXPECTED, check_text_encoder_files
from wan_pack.wan.vae.vae_keys import check_vae_file

Case = tuple[Path, Mutate, Open]


def _config(folder: Path) -> None:
    folder.joinpath("config.json").write_text(json.dumps({"_class_name": "WanModel", "num_heads": TINY.num_heads}))


def transformer(folder: Path) -> Case:
    path = write_official(folder, random_weights()) / "diffusion_pytorch_model.safetensors"
    return path, mutate_safetensors, lambda: Checkpoint([path])


def quantised_transformer(folder: Path) -> Case:
    _config(folder)
    path, weights = folder / "fp8.safetensors", random_weights()
    says = {f"{layer}.comfy_quant": comfy_quant(format="float8_e4m3fn") for layer in quantised_layers(weights)}
    write_scaled(path, weights, torch.float8_e4m3fn, scale="weight_scale", per_row=True, extra=says)
    return path, mutate_safetensors, lambda: Checkpoint([path])


def transformer_gguf(folder: Path) -> Case:
    _config(folder)
    path = folder / "wan.gguf"
    write_gguf(path, random_weights(), "Q8_0")
    return path, mutate_head(6000), lambda: Checkpoint([path])


def transformer_index(folder: Path) -> Case:
    write_official(folder, random_weights(), shards=2)
    return folder / "diffusion_pytorch_model.safetensors.index.json", mutate_text, lambda: checkpoint_files(folder)


def transformer_config(folder: Path) -> Case:
    files = checkpoint_files(write_official(folder, random_weights()))
    return folder / "config.json", mutate_text, lambda: Checkpoint(files)


def vae(folder: Path) -> Case:
    path = folder / "vae.safetensors"
    official = load_file(GOLDEN / "vae_wan22" / "vae" / "model.safetensors")
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in official.items()}, path)
    return path, mutate_safetensors, lambda: check_vae_file(path)


def vae_pth(folder: Path) -> Case:
    path = folder / "vae.pth"
    # Views of one number: every tensor's name and shape, and next to no bytes.
    official = load_file(GOLDEN / "vae_wan21" / "vae" / "model.safetensors")
    torch.save({name: torch.zeros(1).expand(tensor.shape) for name, tensor in official.items()}, path)
    return path, mutate_zip, lambda: check_vae_file(path)


def text_encoder(folder: Path) -> Case:
    path, tensors = folder / "umt5.safetensors", hf_weights()
    layer = "encoder.block.1.layer.0.SelfAttention.q"
    tensors |= {
        "spiece_model": torch.zeros(9, dtype=torch.uint8),
        f"{layer}.weight": tensors[f"{layer}.weight"].to(torch.float8_e4m3fn),
        f"{layer}.weight_scale": torch.ones(48, 1),
    }
    metadata = {"_quantization_metadata": json.dumps({"layers": {layer: {"format": "float8_e4m3fn"}}})}
    save_file(tensors, path, metadata=metadata)
    return path, mutate_safetensors, lambda: check_text_encoder_files([path], [])


def text_encoder_pth(folder: Path) -> Case:
    path, tokenizer = folder / "umt5.pth", folder / "spiece.model"
    tokenizer.write_bytes(b"unread")
    torch.save({name: torch.zeros(1).expand(tensor.shape) for name, tensor in load_file(MODEL).items()}, path)
    return path, mutate_zip, lambda: check_text_encoder_files([path], [tokenizer])


def text_encoder_gguf(folder: Path) -> Case:
    path = folder / "umt5.gguf"
    metadata = gguf_tokenizer(train_spiece()) | {"tokenizer.ggml.precompiled_charsmap": [0] * 100}
    write_text_encoder_gguf(path, wide_hf_weights(), "Q8_0", metadata)
    return path, mutate_head(12_000), lambda: check_text_encoder_files([path], [])


def text_encoder_index(folder: Path) -> Case:
    path = folder / "model.safetensors.index.json"
    names = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    for name in names:
        (folder / name).touch()
    path.write_text(json.dumps({"metadata": {}, "weight_map": {f"t{i}": names[i % 3] for i in range(24)}}))
    return path, mutate_text, lambda: folder_files(folder, EXPECTED)


def lora(folder: Path) -> Case:
    path = FAMILIES["diffusers, alpha in metadata"](folder / "lora.safetensors")
    return path, mutate_safetensors, lambda: Lora(path, 1.0, TARGETS)


PART = 1 if "SOAK_FILES" in os.environ else 10
"""Every file is damaged in the ways of the first of so many parts of its seeds."""
COUNTS: dict[Callable[[Path], Case], int] = {
    transformer: 1500,
    quantised_transformer: 1500,
    transformer_gguf: 1500,
    transformer_index: 2000,
    transformer_config: 1000,
    vae: 1500,
    vae_pth: 1000,
    text_encoder: 2500,
    text_encoder_pth: 2000,
    text_encoder_gguf: 1500,
    text_encoder_index: 1500,
    lora: 2500,
}


@pytest.mark.parametrize("make", COUNTS, ids=lambda make: make.__name__)
def test_fault_21_damaged_files_are_refused_by_name(make: Callable[[Path], Case], tmp_path: Path) -> None:
    path, mutate, open_file = make(tmp_path)

    def open_anew():
        # Written thousands of times a second, a file looks the same to the clock of its system.
        _open_file.cache_clear()
        return open_file()

    tally = try_mutations(path, mutate, open_anew, COUNTS[make] // PART)
    assert tally.refused > tally.accepted, tally


def test_all_parts_are_twenty_thousand() -> None:
    assert sum(COUNTS.values()) == 20_000
