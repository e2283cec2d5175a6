"""LoRAs in 8 bits whose matrices have scales."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lora_families import TARGETS
from safetensors.torch import save_file
from wan_pack.wan.files import stored_tensor
from wan_pack.wan.lora.lora import Lora
from wan_pack.wan.lora.merging import merge

Q = "blocks.0.self_attn.q"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("ending", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("per_row", [False, True])
def test_scaled_matrices_are_read_with_their_scales(
    tmp_path: Path, dtype: torch.dtype, ending: str, per_row: bool, monkeypatch: pytest.MonkeyPatch
):
    """As a file of values is, also from the middle of a row of ranks on, and in pieces that end within a row."""
    values, scaled = {}, {}
    generator = torch.Generator().manual_seed(0)
    for role, shape in (("lora_down", (2, 32)), ("lora_up", (32, 2))):
        name, tensor = f"{Q}.{role}.weight", torch.randn(shape, generator=generator)
        largest = 127 if dtype == torch.int8 else torch.finfo(dtype).max
        scale = tensor.abs().amax(1, keepdim=True) / largest if per_row else tensor.abs().max() / largest
        codes = tensor / scale
        codes = codes.round().to(dtype) if dtype == torch.int8 else codes.clamp(-largest, largest).to(dtype)
        values[name] = codes.float() * scale
        scaled |= {name: codes, f"{name.removesuffix('weight')}{ending}": scale}
    rows = []
    for kind, tensors in (("values", values), ("scaled", scaled)):
        save_file(tensors, tmp_path / f"{kind}.safetensors")
        lora = Lora(tmp_path / f"{kind}.safetensors", 0.7, TARGETS)
        assert lora.applied == 1 and not lora.skipped
        target = torch.zeros(TARGETS[f"{Q}.weight"])
        merge([lora], f"{Q}.weight", target, 0)
        part = torch.zeros_like(target[3:7])
        merge([lora], f"{Q}.weight", part, 3)
        torch.testing.assert_close(part, target[3:7])
        rows.append(target)
        with monkeypatch.context() as patched:
            patched.setattr(stored_tensor, "FLOAT_PIECE", 5)
            pieces = torch.zeros_like(target)
            merge([lora], f"{Q}.weight", pieces, 0)
        assert torch.equal(pieces, target)
    assert rows[0].abs().max() > 0 and torch.equal(*rows)
    wrong = scaled | {name: torch.ones(3, 1) for name in scaled if name.endswith(ending)}
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="it must be one number, or one for each of the "):
        Lora(tmp_path / "wrong.safetensors", 0.7, TARGETS)


def test_a_damaged_scale_is_none_of_the_matrix_before_it(tmp_path: Path):
    tensors = {}
    for module, scale in (("k", 1.0), ("q", torch.nan)):
        for role, shape in (("lora_down", (2, 32)), ("lora_up", (32, 2))):
            name = f"blocks.0.self_attn.{module}.{role}"
            tensors |= {
                f"{name}.weight": torch.ones(shape, dtype=torch.int8),
                f"{name}.weight_scale": torch.full((shape[0],), scale),
            }
    save_file(tensors, tmp_path / "l.safetensors")
    lora, rows = Lora(tmp_path / "l.safetensors", 0.5, TARGETS), torch.zeros(32, 32)
    merge([lora], "blocks.0.self_attn.k.weight", rows, 0)
    assert torch.equal(rows, torch.ones(32, 32)), "0.5 x 2 ones"
    with pytest.raises(ValueError, match="a weight's scale is not a finite number"):
        merge([lora], f"{Q}.weight", rows, 0)
