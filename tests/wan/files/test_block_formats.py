"""int8 with ConvRot or blocks, nvfp4, mxfp8 and fp8 by blocks: every value is what the codes and scales stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from block_formats import FORMATS, convrot, mxfp8, nvfp4, store
from checkpoint_formats import is_quantised, quantised_layers
from ranks import run_ranks
from safetensors.torch import save_file
from tiny import random_weights
from wan_pack.wan.checkpoint.checkpoint import Checkpoint
from wan_pack.wan.checkpoint.weights import empty_model, read_weights
from wan_pack.wan.files import stored_tensor
from wan_pack.wan.files.block_scaled import _powers_of_two
from wan_pack.wan.model.config import WanConfig

CONFIG = WanConfig(dim=256, ffn_dim=192, num_heads=2, num_layers=2, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)
CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "torchao fp8"])
def test_every_value_is_read(tmp_path: Path, kind: str):
    weights, path = random_weights(CONFIG), tmp_path / "m.safetensors"
    values = store(path, kind, weights)
    checkpoint = Checkpoint([path])
    assert not [name for name, weight in checkpoint.codes.items() if weight.dtype != torch.int8]
    model = empty_model(checkpoint, torch.float32).to_empty(device=CPU)
    read_weights(model, checkpoint, device=CPU)
    # A rotation is a sum of products; all else is one product, or two.
    close = {"rtol": 1e-5, "atol": 1e-6} if "ConvRot" in kind else {"rtol": 2**-22, "atol": 0.0}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.data, values[name], **close, msg=lambda m, n=name: f"{n}: {m}")
    assert sum(is_quantised(name, value) for name, value in values.items()) == len(quantised_layers(weights)) == 20


@pytest.mark.parametrize("kind", ["int8 ConvRot", "nvfp4", "mxfp8", "int8 by squares"])
def test_shards_and_merged_loras_have_the_rows_of_the_whole(tmp_path: Path, kind: str):
    """Three ranks, so that shards end within blocks of rows."""
    (tmp_path / "model").mkdir()
    store(tmp_path / "model" / "m.safetensors", kind, random_weights(CONFIG))
    lora = {"lora_A": torch.randn(4, 256) / 8, "lora_B": torch.randn(192, 4) / 8}
    save_file({f"blocks.0.ffn.0.{role}.weight": factor for role, factor in lora.items()}, tmp_path / "l.safetensors")
    loras = [(str(tmp_path / "l.safetensors"), 0.5)]
    results = run_ranks("merged_shards", 3, folder=str(tmp_path / "model"), loras=loras, mixed_precision="bf16")
    assert [result["blocks.0.self_attn.q.weight"] for result in results] == [86, 86, 84]


def test_the_usual_group_is_256(tmp_path: Path):
    config = WanConfig(dim=256, ffn_dim=256, num_heads=2, num_layers=1, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)
    weights, path = random_weights(config), tmp_path / "m.safetensors"
    name = "blocks.0.self_attn.q"
    stored, values = convrot(256, told=False)(weights[f"{name}.weight"])
    save_file(weights | {f"{name}.{part}": tensor for part, tensor in stored.items()}, path)
    out = torch.empty(256, 256)
    Checkpoint([path]).read_into(f"{name}.weight", out, staging=torch.empty(1 << 20, dtype=torch.uint8))
    torch.testing.assert_close(out, values, rtol=1e-5, atol=1e-6)


def test_a_block_scale_that_is_no_number_is_an_error(tmp_path: Path):
    """The largest that is one, 2**127, is."""
    weights, path = random_weights(CONFIG), tmp_path / "m.safetensors"
    stored, _ = mxfp8(weights["blocks.0.self_attn.q.weight"])
    assert _powers_of_two(torch.tensor([0, 127, 254], dtype=torch.uint8)).tolist() == [2.0**-127, 1.0, 2.0**127]
    stored["weight_scale"].view(-1)[0] = 255
    save_file(weights | {f"blocks.0.self_attn.q.{part}": tensor for part, tensor in stored.items()}, path)
    with pytest.raises(ValueError, match=r"m\.safetensors is damaged: a weight's scale"):
        Checkpoint([path]).read_into("blocks.0.self_attn.q.weight", torch.empty(256, 256))


@pytest.mark.parametrize("kind", FORMATS)
def test_any_rows_have_the_values_of_the_whole(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    """As a rank of several reads them, and few at a time, as those of a large weight."""
    name, path = "blocks.0.ffn.0.weight", tmp_path / "m.safetensors"
    values = store(path, kind, random_weights(CONFIG))[name]
    checkpoint, width = Checkpoint([path]), values.shape[1]
    for at_once in (stored_tensor.FLOAT_PIECE, 5 * width):
        monkeypatch.setattr(stored_tensor, "FLOAT_PIECE", at_once)
        for first, count in ((0, 192), (1, 3), (70, 122)):
            rows = torch.empty(count, width)
            checkpoint.read_into(name, rows, start=first * width, staging=torch.empty(1 << 20, dtype=torch.uint8))
            torch.testing.assert_close(rows, values[first : first + count], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_nvfp4s_one_number_may_be_of_any_float_dtype(tmp_path: Path, dtype: torch.dtype):
    weights, path, name = random_weights(CONFIG), tmp_path / "m.safetensors", "blocks.0.self_attn.q"
    stored, values = nvfp4(weights[f"{name}.weight"])
    stored["weight_scale_2"] = stored["weight_scale_2"].to(dtype)
    save_file(weights | {f"{name}.{part}": tensor for part, tensor in stored.items()}, path)
    out = torch.empty(256, 256)
    Checkpoint([path]).read_into(f"{name}.weight", out)
    torch.testing.assert_close(out, values / 0.003 * stored["weight_scale_2"].float(), rtol=1e-5, atol=1e-7)
