"""LoRAs of which some blocks or layers are used: the others keep their weights, merged or beside."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from checkpoint_formats import read_model, write_scaled
from safetensors.torch import save_file
from tiny import random_weights
from torch import Tensor
from wan_pack.distributed.job.model_files import FileIdentity, LoraFile
from wan_pack.distributed.job.strict_json import build
from wan_pack.wan.checkpoint.keeping import Keeping
from wan_pack.wan.lora.lora import Lora
from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.model.linear import Linear
from wan_pack.wan.model.selection import Selection

CONFIG = WanConfig(dim=128, ffn_dim=80, num_heads=1, num_layers=12, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)
CHANGED = {
    "blocks.1.self_attn.q": (128, 128), "blocks.1.ffn.0": (80, 128), "blocks.11.self_attn.q": (128, 128),
    "text_embedding.2": (128, 128),
}  # fmt: skip
SELECTIONS = {
    Selection(): set(CHANGED),
    # Block 11 does not begin with 1.
    Selection((1,)): {"blocks.1.self_attn.q", "blocks.1.ffn.0", "text_embedding.2"},
    Selection((0, 11)): {"blocks.11.self_attn.q", "text_embedding.2"},
    Selection((1, 11), ("ffn",)): {"blocks.1.self_attn.q", "blocks.11.self_attn.q", "text_embedding.2"},
    Selection((5,), ("diffusion_model.text",)): set(),
}


def write_lora(path: Path) -> dict[str, Tensor]:
    generator, tensors, changes = torch.Generator().manual_seed(1), {}, {}
    for module, (out, width) in CHANGED.items():
        up, down = torch.randn(out, 2, generator=generator), torch.randn(2, width, generator=generator)
        # As kohya's trainer spells it: what is selected has its official name.
        name = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(2.0)}
        changes[module] = up @ down
    save_file(tensors, path)
    return changes


@pytest.mark.parametrize("how", ["merged", "beside"])
@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_only_what_is_selected_is_changed(tmp_path: Path, selection: Selection, how: str):
    path = tmp_path / "m.safetensors"
    weights = random_weights(CONFIG)
    if how == "merged":
        save_file(weights, path)
        values = weights
    else:
        values = write_scaled(path, weights, torch.float8_e4m3fn, scale="weight_scale", per_row=True)
    changes = write_lora(tmp_path / "l.safetensors")
    sizes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if not SELECTIONS[selection]:
        with pytest.raises(ValueError, match=r"nothing of it is selected \(blocks 5; without diffusion_model\.text\)"):
            Lora(tmp_path / "l.safetensors", 0.5, sizes, selection=selection)
        return
    lora = Lora(tmp_path / "l.safetensors", 0.5, sizes, selection=selection)
    left = len(CHANGED) - len(SELECTIONS[selection])
    assert (f"{left} left out as selected ({selection})" in lora.report()) == bool(left)
    model = read_model(path, torch.float32, [lora], Keeping(quantised_loras=how))
    for module, change in changes.items():
        layer, expected = model.get_submodule(module), values[f"{module}.weight"]
        assert isinstance(layer, Linear)
        got = layer.unpacked_weight()
        if layer.lora_down is not None:
            got = got + layer.lora_up @ layer.lora_down
        if module in SELECTIONS[selection]:
            expected = expected + 0.5 * change
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=module: f"{n}: {m}")


def test_blocks_of_another_kind_are_none_that_can_be_chosen():
    assert Selection().has("vace_blocks.1.ffn.0") and not Selection((1,)).has("vace_blocks.1.ffn.0")
    assert Selection((1,)).has("blocks.1.ffn.0") and Selection((1,)).has("head.head")


def test_a_job_keeps_the_selection(tmp_path: Path):

    (tmp_path / "l.safetensors").touch()
    file = FileIdentity.of(tmp_path / "l.safetensors")
    lora = LoraFile(file=file, strength=1.0, selection=Selection((1, 3), ("ffn",)))

    assert build(LoraFile, json.loads(json.dumps(dataclasses.asdict(lora))), "lora") == lora
    for blocks in ((-1,), (1000,), tuple(range(1000)) * 2):
        with pytest.raises(ValueError, match=r"blocks is .*at most 1000 numbers under 1000"):
            LoraFile(file=file, strength=1.0, selection=Selection(blocks))
