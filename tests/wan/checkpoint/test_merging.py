"""LoRAs merged into weights that stay in 8 bits, against plain casts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_formats import Weights, is_quantised, read_model, write_fp8
from safetensors.torch import load_file, save_file
from tiny import random_weights
from wan_pack.wan.lora.lora import Lora
from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.model.eight_bits import FP8_DTYPES, quantise_rows
from wan_pack.wan.model.linear import Linear

CONFIG = WanConfig(dim=128, ffn_dim=80, num_heads=1, num_layers=2, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)
E4M3, E5M2 = FP8_DTYPES
Q = "blocks.0.self_attn.q.weight"


def write_sparse_lora(path: Path, targets: list[str], weights: Weights) -> Weights:
    """A LoRA whose products and sums are exact: of powers of two, zero in half of the columns and in row 1, by far
    larger than the weights in row 0. Returns its whole changes."""
    generator, tensors, changes = torch.Generator().manual_seed(9), {}, {}
    for name in targets:
        out, width = weights[name].shape
        up = torch.randint(-1, 2, (out, 4), generator=generator) * 2.0**-4
        up[0], up[1] = 2.0**22, 0
        down = torch.randint(-1, 2, (4, width), generator=generator) * 2.0**-4
        down[:, 1::2] = 0
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}
        changes[name] = up @ down
    save_file(tensors, path)
    return changes


def cast_with(scale: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """By plain casts: codes and scales of `exact` with the file's scale, or another where rows outgrow it."""
    largest, beyond = {E4M3: (448, 464), E5M2: (57344, 61440)}[dtype]
    scale = scale.expand(len(exact), 1).clone()
    for row in range(len(exact)):
        if exact[row].abs().max() > beyond * scale[row]:
            scale[row] = exact[row].abs().max() / largest
    return (exact / scale).clamp(-largest, largest).to(dtype), scale


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("kind", ["plain", "scale_weight by tensor", "weight_scale by row"])
def test_lora_on_fp8_keeps_the_files_scales_where_they_fit(tmp_path: Path, dtype: torch.dtype, kind: str):
    values = write_fp8(tmp_path / "m.safetensors", random_weights(CONFIG), kind, dtype)
    stored = load_file(tmp_path / "m.safetensors")
    changed = ["blocks.1.ffn.2.weight", Q]
    changes = write_sparse_lora(tmp_path / "l.safetensors", changed, values)
    lora = Lora(tmp_path / "l.safetensors", 0.5, {name: tuple(t.shape) for name, t in values.items()})
    model = read_model(tmp_path / "m.safetensors", torch.float32, (lora,))
    for name, value in values.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(layer, Linear) or not name.endswith("weight"):
            continue
        if name not in changed:
            assert torch.equal(layer.unpacked_weight(), value), name
            assert (layer.weight_scale is None) == (kind == "plain" or not is_quantised(name, value)), name
            continue
        named = name.removesuffix("weight") + kind.partition(" by ")[0]
        own = stored.get(named, torch.ones(1)).reshape(-1, 1)
        codes, scale = cast_with(own, value + 0.5 * changes[name], dtype)
        assert layer.weight.dtype == dtype
        assert torch.equal(layer.weight.float(), codes.float()) and torch.equal(layer.weight_scale, scale), name
        # A row that outgrew the type has a scale of its own; what the LoRA leaves alone keeps its bits elsewhere.
        assert (scale[0] != own[0]).all() and torch.equal(scale[1:], own.expand(len(value), 1)[1:])
        untouched = changes[name] == 0
        untouched[0] = False
        assert 0.5 < untouched.float().mean() < 1
        assert torch.equal(layer.weight.view(torch.uint8)[untouched], stored[name].view(torch.uint8)[untouched])


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_codes_that_are_not_changed_are_given_back(dtype: torch.dtype):
    """All that there are, with scales whose quotients are not exact."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    every = every[every.float().isfinite()].repeat(64, 1)
    scale = torch.rand(64, 1, generator=torch.Generator().manual_seed(1)) * 1e-3
    codes, kept = quantise_rows(every.float() * scale, dtype, scale)
    assert torch.equal(codes.float(), every.float()) and torch.equal(kept, scale)
