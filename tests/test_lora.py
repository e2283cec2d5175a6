"""LoRA files merged row by row equal the whole update."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from wan_pack.wan.lora import Lora, merge

TARGETS = {"blocks.0.self_attn.q.weight": (6, 5)}


def write_lora(path: Path, prefix: str = "", *, alpha: float | None = 2.0, rows: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"{prefix}blocks.0.self_attn.q.lora_down.weight": torch.randn(4, 5, generator=generator),
        f"{prefix}blocks.0.self_attn.q.lora_up.weight": torch.randn(rows, 4, generator=generator),
    }
    if alpha is not None:
        tensors[f"{prefix}blocks.0.self_attn.q.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return tensors


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
@pytest.mark.parametrize("alpha", [2.0, None])
def test_parts_add_up_to_the_whole_update(tmp_path: Path, prefix: str, alpha: float | None):
    down, up, *_ = write_lora(tmp_path / "l.safetensors", prefix, alpha=alpha).values()
    base = torch.randn(6, 5)
    expected = base + 0.5 * (1.0 if alpha is None else alpha / 4) * up @ down
    lora = Lora(tmp_path / "l.safetensors", 0.5, TARGETS)
    parts = [base[:4].clone(), base[4:].clone()]
    merge([lora], "blocks.0.self_attn.q.weight", parts[0], 0)
    merge([lora], "blocks.0.self_attn.q.weight", parts[1], 4)
    torch.testing.assert_close(torch.cat(parts), expected)
    assert "applied 1" in lora.report()


def test_two_loras_round_once(tmp_path: Path):
    """In bf16, adding one after the other would round twice."""
    down, up, _ = write_lora(tmp_path / "l.safetensors").values()
    base = torch.randn(6, 5).bfloat16()
    loras = [Lora(tmp_path / "l.safetensors", strength, TARGETS) for strength in (0.3, 0.7)]
    expected = (base.float() + 0.5 * (up @ down)).bfloat16()
    rows = base.clone()
    merge(loras, "blocks.0.self_attn.q.weight", rows, 0)
    torch.testing.assert_close(rows, expected, rtol=1e-2, atol=0)


def test_a_lora_that_fits_nothing_is_refused(tmp_path: Path):
    write_lora(tmp_path / "l.safetensors")
    with pytest.raises(ValueError, match=r"l.safetensors holds no LoRA for this model"):
        Lora(tmp_path / "l.safetensors", 1.0, {"blocks.9.ffn.0.weight": (6, 5)})
    with pytest.raises(ValueError, match=r"changes a matrix of 6 x 5; the model's is 7 x 5"):
        Lora(tmp_path / "l.safetensors", 1.0, {"blocks.0.self_attn.q.weight": (7, 5)})
