"""VACE's blocks beside the main ones: their order, their weights in every format, and what several controls do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_formats import Weights, read_model, write_fp8, write_gguf
from safetensors.torch import save_file
from tiny import GRID, TINY, TINY_VACE, random_weights, write_official
from torch import Tensor
from wan_pack.benchmarks.released_sizes import WAN_CONFIGS
from wan_pack.wan.checkpoint.checkpoint import Checkpoint, checkpoint_files
from wan_pack.wan.files.diffusers_keys import to_official
from wan_pack.wan.lora.lora import Lora
from wan_pack.wan.model.config import config_from_shapes
from wan_pack.wan.model.linear import FP8_PRODUCTS
from wan_pack.wan.model.patch import patchify
from wan_pack.wan.model.rope import rope_table
from wan_pack.wan.transformer.conditions import Beside
from wan_pack.wan.transformer.context import Context, pad_text
from wan_pack.wan.transformer.transformer import WanModel, meta_model
from wan_pack.wan.transformer.vace import Control

SINGLE = replace(TINY_VACE, dim=128, num_heads=1, num_layers=4, vace_layers=(0, 2))
"""Of heads of 128 channels and with evenly spread blocks: it needs no config.json."""
VACE_14B = WAN_CONFIGS["vace-14B"]


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def control(seed: int = 5, strength: float = 1.0) -> Control:
    return Control(noise(seed, 45, 4 * 96), strength)


def evaluate(model: WanModel, *controls: Control) -> Tensor:
    text = Context(pad_text(noise(4, 9, TINY.text_dim)))
    rope = rope_table(GRID, model.config.head_dim)
    return model(noise(3, 45, 64), torch.tensor([700.0]), text, rope, beside=Beside(controls=controls))


def model_of(weights: Weights, config: object = TINY_VACE) -> WanModel:
    model = meta_model(config, torch.float32)
    model.load_state_dict(weights, assign=True)
    return model


def test_blocks_run_right_behind_their_main_ones():
    assert TINY_VACE.block_names == (
        "blocks.0", "vace_blocks.0", "blocks.1", "blocks.2", "blocks.3", "vace_blocks.1", "blocks.4"
    )  # fmt: skip
    model, ran = meta_model(TINY_VACE, torch.float32), []
    model = model_of(random_weights(TINY_VACE))
    for name in TINY_VACE.block_names:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    evaluate(model, control(), control(6))
    # Once for all controls: weights that are gathered or streamed come once.
    assert tuple(ran) == TINY_VACE.block_names
    assert [model.get_submodule(name) for name in TINY_VACE.block_names] == model.running_order


def test_the_14b_model_has_its_official_size():
    """Eight blocks more than T2V's forty, a projection behind each, one before, and an embedding of 96 channels."""
    model, t2v = meta_model(VACE_14B, torch.bfloat16), meta_model(WAN_CONFIGS["t2v-A14B"], torch.bfloat16)
    block = sum(p.numel() for p in t2v.blocks[0].parameters())
    square = 5120 * 5120 + 5120
    expected = sum(p.numel() for p in t2v.parameters()) + 8 * (block + square) + square + 5120 * (96 * 4 + 1)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert config_from_shapes({n: tuple(p.shape) for n, p in model.named_parameters()}) == VACE_14B


def test_strength_scales_the_hints():
    model = model_of(random_weights(TINY_VACE, scale=0.3))
    without = evaluate(model)
    torch.testing.assert_close(evaluate(model, control(strength=0.0)), without)
    assert (evaluate(model, control()) - without).abs().max() > 0.01
    # Two halves of one control add up to it.
    halves = evaluate(model, control(strength=0.5), control(strength=0.5))
    torch.testing.assert_close(halves, evaluate(model, control()))
    one, other = control(5), control(6, 0.3)
    torch.testing.assert_close(evaluate(model, one, other), evaluate(model, other, one))


def test_text_is_kept_for_both_kinds_of_blocks():
    model, text = model_of(random_weights(TINY_VACE)), Context(pad_text(noise(4, 9, TINY.text_dim)))
    rope = rope_table(GRID, TINY.head_dim)
    told = Beside(controls=[control()])
    first, second = (model(noise(3, 45, 64), torch.tensor([700.0]), text, rope, beside=told) for _ in range(2))
    assert torch.equal(first, second)
    assert len(text._keys_values) == len(TINY_VACE.block_names)


def test_a_ranks_part_of_a_control_is_no_part_of_the_memory_of_the_whole():
    latents = noise(1, 96, 3, 6, 10)
    part = Control(latents, 0.5).on_rank(lambda tokens: tokens[15:30], 45)
    assert part.strength == 0.5 and torch.equal(part.values, patchify(latents)[15:30])
    assert part.values.untyped_storage().nbytes() == 15 * 4 * 96 * 4


# Files


def test_config_json_says_where_the_blocks_are(tmp_path: Path):
    folder = write_official(tmp_path / "m", random_weights(TINY_VACE), TINY_VACE)
    assert Checkpoint(checkpoint_files(folder)).config == TINY_VACE
    told = json.loads((folder / "config.json").read_text())
    for layers, words in (
        ([0], "its 2 VACE blocks run behind blocks"),
        ([0, 5], r"behind blocks \[0, 5\] of 5"),
        ([1, 2], r"from block 0 on"),
        ([0, "x"], r"config\.json: vace_layers is \[0, 'x'\]; it must be a list of numbers"),
    ):
        (folder / "config.json").write_text(json.dumps({**told, "vace_layers": layers}))
        with pytest.raises(ValueError, match=words):
            Checkpoint(checkpoint_files(folder))


def test_a_single_file_is_spread_evenly(tmp_path: Path):
    save_file(random_weights(SINGLE), tmp_path / "m.safetensors")
    assert Checkpoint([tmp_path / "m.safetensors"]).config == SINGLE
    # As ComfyUI's own: the steps are rounded down.
    uneven = replace(SINGLE, num_layers=5)
    save_file(random_weights(uneven), tmp_path / "m.safetensors")
    assert Checkpoint([tmp_path / "m.safetensors"]).config == uneven


@pytest.mark.parametrize("name", ["vace_blocks.1.after_proj.weight", "vace_blocks.0.before_proj.bias"])
def test_a_missing_part_is_named(tmp_path: Path, name: str):
    weights = random_weights(SINGLE)
    del weights[name]
    save_file(weights, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=f"not a whole VACE transformer: 1 tensors are missing .{name}"):
        Checkpoint([tmp_path / "m.safetensors"])


def test_a_second_before_proj_is_too_much(tmp_path: Path):
    weights = random_weights(SINGLE)
    weights["vace_blocks.1.before_proj.weight"] = weights["vace_blocks.0.before_proj.weight"].clone()
    save_file(weights, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"unknown \(vace_blocks\.1\.before_proj\.weight\)"):
        Checkpoint([tmp_path / "m.safetensors"])


def test_diffusers_calls_all_of_it_something_else():
    from diffusers import WanVACETransformer3DModel

    with torch.device("meta"):
        theirs = WanVACETransformer3DModel(
            num_attention_heads=4, attention_head_dim=8, in_channels=16, out_channels=16, text_dim=48, freq_dim=32,
            ffn_dim=80, num_layers=5, vace_layers=[0, 3], vace_in_channels=96,
        )  # fmt: skip
        ours = WanModel(TINY_VACE)
    found = {to_official(name): tuple(parameter.shape) for name, parameter in theirs.named_parameters()}
    assert found == {name: tuple(parameter.shape) for name, parameter in ours.named_parameters()}


@pytest.mark.parametrize("kind", ["fp8", "gguf"])
def test_quantised_files_compute_as_their_values_do(tmp_path: Path, kind: str):
    path, weights = tmp_path / f"m.{'gguf' if kind == 'gguf' else 'safetensors'}", random_weights(SINGLE)
    if kind == "fp8":
        values = write_fp8(path, weights, "weight_scale by row", torch.float8_e4m3fn)
    else:
        values = write_gguf(path, weights, "Q8_0")
    changed = {name for name, tensor in values.items() if not torch.equal(tensor, weights[name])}
    assert {
        "vace_blocks.1.after_proj.weight",
        "vace_blocks.0.before_proj.weight",
        "vace_blocks.0.ffn.2.weight",
    } <= changed
    torch.testing.assert_close(
        evaluate(read_model(path, torch.float32), control()), evaluate(model_of(values, SINGLE), control())
    )


def test_fp8_products_are_those_of_all_blocks():
    from wan_pack.wan.checkpoint.keeping import Keeping
    from wan_pack.wan.model.eight_bits import E4M3, KeptWeight

    layers = Keeping("fp8").fp8_products(SINGLE)
    assert set(layers) == {f"{block}.{layer}" for block in SINGLE.block_names for layer in FP8_PRODUCTS}
    kept = {f"{layer}.weight": KeptWeight(E4M3, True) for layer in layers}
    model = meta_model(SINGLE, torch.bfloat16, kept, fp8_products=layers)
    assert all(model.get_submodule(layer).fp8_product for layer in layers)


@pytest.mark.parametrize(
    "spelled",
    [
        "diffusion_model.vace_blocks.1.after_proj",
        "lora_unet_vace_blocks_1_after_proj",
        "transformer.vace_blocks.1.proj_out",
        "lora_transformer_vace_blocks_1_proj_out",
    ],
)
def test_a_lora_changes_vace_blocks_by_any_name(tmp_path: Path, spelled: str):
    save_file(random_weights(SINGLE), tmp_path / "m.safetensors")
    up, down = noise(1, 128, 4), noise(2, 4, 128)
    save_file({f"{spelled}.lora_up.weight": up, f"{spelled}.lora_down.weight": down}, tmp_path / "l.safetensors")
    lora = Lora(tmp_path / "l.safetensors", 0.5, Checkpoint([tmp_path / "m.safetensors"]).shapes)
    assert list(lora.updates) == ["vace_blocks.1.after_proj.weight"]
    merged = read_model(tmp_path / "m.safetensors", torch.float32, [lora]).vace_blocks[1].after_proj.weight
    expected = random_weights(SINGLE)["vace_blocks.1.after_proj.weight"] + 0.5 * up @ down
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


def test_a_vace_lora_says_what_of_it_another_model_lacks(tmp_path: Path):
    weights = {}
    for module in ("blocks.0.self_attn.q", "vace_blocks.0.self_attn.q"):
        weights |= {f"{module}.lora_up.weight": noise(1, 32, 4), f"{module}.lora_down.weight": noise(2, 4, 32)}
    save_file(weights, tmp_path / "l.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in random_weights(TINY).items()}
    assert Lora(tmp_path / "l.safetensors", 1.0, shapes).skipped == {
        "of VACE's own blocks": ["vace_blocks.0.self_attn.q"]
    }


def test_hints_are_added_up_in_float32_whatever_the_products_are_in():
    model = meta_model(TINY_VACE, torch.bfloat16).to_empty(device="cpu")
    model.load_state_dict(random_weights(TINY_VACE))
    hints: list[Tensor] = []
    for block in model.vace_blocks:
        block.register_forward_hook(lambda block, given, hint: hints.append(hint))
    evaluate(model, control(strength=1.0), control(6, strength=1 / 3))
    assert [hint.dtype for hint in hints] == [torch.float32] * 2
    # A third of what bf16 holds is none of its values.
    assert all((hint.bfloat16().float() != hint).float().mean() > 0.5 for hint in hints)
