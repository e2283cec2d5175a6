"""The image branch of Wan2.1's I2V and FLF2V: its precision, its names, and what of it is computed once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import GRID, TINY, random_weights
from torch import Tensor
from wan_pack.wan.files.diffusers_keys import to_official
from wan_pack.wan.lora.lora import Lora
from wan_pack.wan.model.config import config_from_shapes
from wan_pack.wan.model.rope import rope_table
from wan_pack.wan.transformer.conditions import Beside
from wan_pack.wan.transformer.context import Context, pad_text
from wan_pack.wan.transformer.transformer import WanModel, meta_model

I2V = replace(TINY, in_dim=36, parts=frozenset({"img_emb"}), clip_dim=64)
FLF2V = replace(I2V, parts=frozenset({"img_emb", "emb_pos"}))


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model_of(config: object = I2V) -> WanModel:
    model = meta_model(config, torch.float32)
    model.load_state_dict(random_weights(config), assign=True)
    return model


def evaluate(model: WanModel, text: Context, picture: Context | None) -> Tensor:
    rope = rope_table(GRID, TINY.head_dim)
    return model(noise(3, 45, 4 * 36), torch.tensor([700.0]), text, rope, beside=Beside(picture=picture))


def prompt(seed: int) -> Context:
    return Context(pad_text(noise(seed, 9, TINY.text_dim)))


def test_its_norms_and_places_stay_float32():
    dtypes = {name: p.dtype for name, p in meta_model(FLF2V, torch.bfloat16).named_parameters()}
    for name in (
        "img_emb.proj.0.weight",
        "img_emb.proj.4.bias",
        "img_emb.emb_pos",
        "blocks.0.cross_attn.norm_k_img.weight",
    ):
        assert dtypes[name] == torch.float32, name
    for name in ("img_emb.proj.1.weight", "img_emb.proj.3.bias", "blocks.1.cross_attn.v_img.weight"):
        assert dtypes[name] == torch.bfloat16, name


def test_its_last_norm_is_computed_in_float32():
    """As the official code has it, whatever the products before it are computed in."""
    model, features = meta_model(FLF2V, torch.bfloat16), noise(1, 257, 64)
    kept = {name: parameter.dtype for name, parameter in model.named_parameters()}
    weights = {name: value.to(kept[name]) for name, value in random_weights(FLF2V).items()}
    model.load_state_dict(weights, assign=True)
    made, last = model.img_emb(features), model.img_emb.proj[4]
    assert made.dtype == torch.float32
    # What a norm in float32 makes of rows is of mean 0 to its precision.
    plain = (made - last.bias) / last.weight
    assert plain.mean(1).abs().max() < 1e-4
    # And so is the first one, whatever the features come in.
    assert torch.equal(model.img_emb(features.half()), model.img_emb(features.half().float()))


@pytest.mark.parametrize("config", [I2V, FLF2V], ids=["I2V", "FLF2V"])
def test_sizes_are_read_off_the_shapes(config: object):
    shapes = {name: tuple(p.shape) for name, p in meta_model(config, torch.float32).named_parameters()}
    assert config_from_shapes(shapes, num_heads=TINY.num_heads) == config


def test_both_prompts_share_what_is_derived_of_the_picture():
    model, picture, runs = model_of(), Context(noise(1, 257, 64)), []
    model.blocks[1].cross_attn.k_img.register_forward_hook(lambda *_: runs.append(1))
    model.img_emb.register_forward_hook(lambda *_: runs.append(2))
    first = evaluate(model, prompt(4), picture)
    assert (evaluate(model, prompt(5), picture) - first).abs().max() > 1e-3
    assert torch.equal(evaluate(model, prompt(4), picture), first)
    assert sorted(runs) == [1, 2]
    fresh = Context(noise(1, 257, 64), keep=False)
    assert torch.equal(evaluate(model, prompt(4), fresh), first)
    assert not fresh._keys_values
    assert (evaluate(model, prompt(4), Context(noise(2, 257, 64))) - first).abs().max() > 1e-3


def test_one_picture_has_the_first_places_of_two():
    model, features = model_of(FLF2V), noise(1, 514, 64)
    both = model.img_emb(features)
    torch.testing.assert_close(model.img_emb(features[:257]), both[:257])
    assert (model.img_emb(features[257:]) - both[257:]).abs().max() > 1e-3


def test_diffusers_calls_all_of_it_something_else():
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        theirs = WanTransformer3DModel(
            num_attention_heads=4, attention_head_dim=8, in_channels=36, out_channels=16, text_dim=48, freq_dim=32,
            ffn_dim=80, num_layers=2, image_dim=64, added_kv_proj_dim=32, pos_embed_seq_len=514,
        )  # fmt: skip
        ours = WanModel(FLF2V)
    found = {to_official(name): tuple(parameter.shape) for name, parameter in theirs.named_parameters()}
    assert found == {name: tuple(parameter.shape) for name, parameter in ours.named_parameters()}


@pytest.mark.parametrize(
    ("spelled", "official", "rows"),
    [
        ("diffusion_model.blocks.1.cross_attn.k_img", "blocks.1.cross_attn.k_img", 32),
        ("lora_unet_blocks_1_cross_attn_v_img", "blocks.1.cross_attn.v_img", 32),
        ("lora_transformer_blocks_1_attn2_add_k_proj", "blocks.1.cross_attn.k_img", 32),
        ("lora_transformer_condition_embedder_image_embedder_ff_net_2", "img_emb.proj.3", 32),
    ],
)
def test_a_lora_changes_it_by_any_name(tmp_path: Path, spelled: str, official: str, rows: int):
    shapes = {name: tuple(tensor.shape) for name, tensor in random_weights(I2V).items()}
    columns = shapes[f"{official}.weight"][1]
    pair = {f"{spelled}.lora_up.weight": noise(1, rows, 4), f"{spelled}.lora_down.weight": noise(2, 4, columns)}
    save_file(pair, tmp_path / "l.safetensors")
    assert list(Lora(tmp_path / "l.safetensors", 1.0, shapes).updates) == [f"{official}.weight"]
