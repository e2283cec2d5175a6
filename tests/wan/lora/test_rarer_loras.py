"""LoRAs as few trainers write them: read like all others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lora_families import TARGETS
from safetensors.torch import save_file
from torch import Tensor
from wan_pack.wan.lora.lora import Lora, lora_modules
from wan_pack.wan.lora.updates import LowRank

Q = "blocks.0.self_attn.q"


def factors(module: str, down: str = "lora_down.weight", up: str = "lora_up.weight") -> dict[str, Tensor]:
    return {f"{module}.{down}": torch.randn(2, 32), f"{module}.{up}": torch.randn(32, 2)}


def opened(folder: Path, tensors: dict[str, Tensor]) -> Lora:
    save_file(tensors, folder / "l.safetensors")
    return Lora(folder / "l.safetensors", 1, TARGETS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.uint8])
def test_an_alpha_may_be_a_whole_number(tmp_path: Path, dtype: torch.dtype):
    """Trainers that are given one keep its type."""
    (update,) = opened(tmp_path, factors(Q) | {f"{Q}.alpha": torch.tensor(6, dtype=dtype)}).updates[f"{Q}.weight"]
    assert isinstance(update, LowRank) and update.scale == 3


SPELLED = {
    "parameters": (Q, "lora_A", "lora_B"),
    "parameters of an adapter": (f"base_model.model.{Q}", "lora_A.default", "lora_B.default"),
    "old diffusers": (
        "transformer.blocks.0.attn1.to_q",
        "lora_linear_layer.down.weight",
        "lora_linear_layer.up.weight",
    ),
    "a distillation's": (f"generator.model.{Q}", "lora_A.weight", "lora_B.weight"),
    "compiled": (f"diffusion_model._orig_mod.{Q}", "lora_down.weight", "lora_up.weight"),
}


@pytest.mark.parametrize("case", SPELLED)
def test_rarer_spellings(tmp_path: Path, case: str):
    module, down, up = SPELLED[case]
    tensors = factors(module, down, up)
    (update,) = opened(tmp_path, tensors).updates[f"{Q}.weight"]
    assert isinstance(update, LowRank) and (update.down.shape, update.up.shape) == ((2, 32), (32, 2))


def test_a_scale_is_not_taken_for_a_factor(tmp_path: Path):
    lora = opened(tmp_path, factors(Q) | {f"{Q}.lora_A.bias": torch.ones(2)})
    assert lora.skipped == {"tensors that are no part of a LoRA": [f"{Q}.lora_A.bias"]}


def test_a_rank_that_is_stabilised_counts_without_an_alpha_too(tmp_path: Path):
    """As PEFT, whose alpha is the rank then: alpha / sqrt(rank)."""
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "use_rslora": true}')
    save_file(factors(Q), tmp_path / "adapter_model.safetensors")
    (update,) = Lora(tmp_path / "adapter_model.safetensors", 1, TARGETS).updates[f"{Q}.weight"]
    assert isinstance(update, LowRank) and update.scale == pytest.approx(2**0.5)


def test_where_alphas_come_from_is_told_in_one_order(tmp_path: Path):
    lora = opened(tmp_path, factors(Q))
    lora._alpha_sources |= {"metadata", "adapter_config.json"}
    lora._notes.clear()
    lora._plan(lora_modules(list(lora._file.tensors))[0])
    assert lora.report().endswith("alpha from adapter_config.json; alpha from metadata")


@pytest.mark.parametrize(("stabilised", "scale"), [(False, 4 / 2), (True, 4 / 2**0.5)])
def test_the_rank_is_that_of_the_factors_where_they_tell(tmp_path: Path, stabilised: bool, scale: float):
    """As of a LoRA that was made smaller and kept its settings."""
    settings = {"r": 8, "lora_alpha": 4, "use_rslora": stabilised}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file(factors(Q), tmp_path / "adapter_model.safetensors")
    (update,) = Lora(tmp_path / "adapter_model.safetensors", 1, TARGETS).updates[f"{Q}.weight"]
    assert isinstance(update, LowRank) and update.scale == pytest.approx(scale)


def test_lengths_of_columns_are_refused_of_a_square_weight_too(tmp_path: Path):
    """There are as many of them as rows."""
    with pytest.raises(ValueError, match=r"dora_scale has shape \[1, 32\]; supported is one length for each of the"):
        opened(tmp_path, factors(Q) | {f"{Q}.dora_scale": torch.ones(1, 32)})
    for shape in ((32,), (32, 1)):
        assert opened(tmp_path, factors(Q) | {f"{Q}.dora_scale": torch.ones(shape)}).applied == 1
