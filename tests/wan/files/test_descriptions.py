"""What a file says of how its layers are stored: of each its own, and of layers that are not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from block_formats import convrot, int8_rows
from checkpoint_formats import comfy_quant, is_quantised, read_model
from safetensors.torch import save_file
from tiny import random_weights
from wan_pack.wan.checkpoint.checkpoint import Checkpoint
from wan_pack.wan.files import stored_model
from wan_pack.wan.model.config import WanConfig

CONFIG = WanConfig(dim=128, ffn_dim=80, num_heads=1, num_layers=2, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)


def test_layers_of_one_file_may_be_stored_in_different_ways(tmp_path: Path):
    """Some rotated, some not: each is what its own description says, whichever comes first."""
    weights, path = random_weights(CONFIG), tmp_path / "m.safetensors"
    layers = [name.removesuffix(".weight") for name in weights if is_quantised(name, weights[name])]
    tensors, values = dict(weights), dict(weights)
    for number, layer in enumerate(layers):
        name = f"{layer}.weight"
        if number % 3 == 0:
            stored, values[name] = convrot(16)(weights[name])
        else:
            codes, scale = int8_rows(weights[name])
            stored = {"weight": codes, "weight_scale": scale, "comfy_quant": comfy_quant(format="int8_tensorwise")}
            values[name] = codes.float() * scale
            if number % 3 == 2:
                del stored["comfy_quant"]
        tensors |= {f"{layer}.{part}": tensor for part, tensor in stored.items()}
    save_file(tensors, path)
    for name, parameter in read_model(path, torch.float32).named_parameters():
        torch.testing.assert_close(parameter.data, values[name], rtol=1e-5, atol=1e-6)


def test_what_is_said_of_a_layer_that_is_not_there_may_be_meant_for_any(tmp_path: Path):
    weights, path = random_weights(CONFIG), tmp_path / "m.safetensors"
    for layer, ours in (("blocks.0.attention.q", True), ("text_model.layer", False)):
        said = {"format_version": "1.0", "layers": {layer: {"format": "svdquant_w4a4"}}}
        more = {} if ours else {f"cond_stage_model.{layer}.weight": torch.ones(4)}
        prefix = "" if ours else "model.diffusion_model."
        if not ours:
            said["layers"] = {f"cond_stage_model.{layer}": {"format": "svdquant_w4a4"}}
        save_file({prefix + name: tensor for name, tensor in weights.items()} | more, path,
                  metadata={"_quantization_metadata": json.dumps(said)})  # fmt: skip
        if ours:
            with pytest.raises(ValueError, match=r"quantised as svdquant_w4a4 \(blocks\.0\.attention\.q\)"):
                Checkpoint([path])
        else:
            # That of another model in the file is its own affair.
            Checkpoint([path])


def test_a_description_that_cannot_be_understood_names_the_file_first(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    save_file({"a.comfy_quant": comfy_quant(format=7)}, path)
    with pytest.raises(ValueError, match=rf"^{path} describes its quantisation in an unknown way: the format of a"):
        stored_model.open_file(str(path))
