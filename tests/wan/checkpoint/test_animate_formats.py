"""Animate's further weights in the formats that files have, and changed by a LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_formats import Weights, read_model, write_gguf, write_scaled
from safetensors.torch import save_file
from tiny import TINY_ANIMATE, random_weights
from torch import Tensor
from wan_pack.wan.checkpoint.checkpoint import Checkpoint
from wan_pack.wan.lora.lora import Lora
from wan_pack.wan.model.rope import rope_table
from wan_pack.wan.transformer.animate import Face, Pose
from wan_pack.wan.transformer.conditions import Conditions
from wan_pack.wan.transformer.context import Context
from wan_pack.wan.transformer.transformer import WanModel

CONFIG = replace(TINY_ANIMATE, dim=128, ffn_dim=256, num_heads=1)
"""Without a config.json a head has 128 channels."""
LAYER = "face_adapter.fuser_blocks.1.linear1_kv"
FORMATS: dict[str, Callable[[Path, Weights], Weights]] = {
    "fp8": lambda path, weights: write_scaled(
        path, weights, torch.float8_e4m3fn, scale="scale_weight", per_row=False, extra={"scaled_fp8": torch.ones(())}
    ),
    "int8": lambda path, weights: write_scaled(path, weights, torch.int8, scale="weight_scale", per_row=True),
    "Q8_0": lambda path, weights: write_gguf(path, weights, "Q8_0"),
}


def velocity(model: WanModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    picture = Context(noise(257, CONFIG.clip_dim))
    told = Conditions(picture=picture, pose=Pose(noise(16, 2, 6, 10)), face=Face(noise(3, 1, 512, 512), 3))
    beside = told.on_rank(lambda tokens: tokens, 45, torch.device("cpu")).beside(keep=True)
    text = Context(noise(512, CONFIG.text_dim))
    rope = rope_table((3, 3, 5), CONFIG.head_dim)
    with torch.no_grad():
        return model(noise(45, 4 * CONFIG.in_dim), torch.tensor([700.0]), text, rope, beside=beside)


def plain(folder: Path, weights: Weights) -> WanModel:
    save_file(weights, folder / "plain.safetensors")
    return read_model(folder / "plain.safetensors", torch.float32)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_in_eight_bits_gives_what_it_stands_for(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The face's blocks in 8 bits too, and the blur's taps beside them, as released files have them."""
    quantised = ("blocks.", "face_adapter.")
    monkeypatch.setattr(
        "checkpoint_formats.is_quantised", lambda name, tensor: name.startswith(quantised) and tensor.dim() == 2
    )
    taps = {"motion_encoder.enc.net_app.convs.1.conv2.0.kernel": torch.ones(4, 4)}
    path = tmp_path / f"animate.{'gguf' if kind == 'Q8_0' else 'safetensors'}"
    values = FORMATS[kind](path, random_weights(CONFIG, scale=0.3) | taps)
    model = read_model(path, torch.float32)
    kept = model.get_submodule(LAYER).weight.dtype
    assert (kept == torch.float8_e4m3fn) == (kind == "fp8")
    expected = velocity(plain(tmp_path, values))
    torch.testing.assert_close(velocity(model), expected, rtol=1e-4, atol=1e-4)


def test_a_lora_changes_a_faces_block(tmp_path: Path) -> None:
    weights = random_weights(CONFIG, scale=0.3)
    before = velocity(plain(tmp_path, weights))
    up, down = torch.randn(2 * CONFIG.dim, 2), torch.randn(2, CONFIG.dim)
    save_file(
        {f"diffusion_model.{LAYER}.lora_up.weight": up, f"diffusion_model.{LAYER}.lora_down.weight": down},
        tmp_path / "lora.safetensors",
    )
    path = tmp_path / "plain.safetensors"
    lora = Lora(tmp_path / "lora.safetensors", 0.5, Checkpoint([path]).shapes)
    merged = velocity(read_model(path, torch.float32, [lora]))
    weights[f"{LAYER}.weight"] += 0.5 * up @ down
    torch.testing.assert_close(merged, velocity(plain(tmp_path, weights)), rtol=1e-4, atol=1e-4)
    assert (merged - before).abs().max() > 1e-3
