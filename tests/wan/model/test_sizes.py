"""What a header may say of a model's sizes, and what the latents of a video are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny import TINY, TINY_VACE
from wan_pack.wan.model.config import MAX_LAYERS, WanConfig, config_from_shapes
from wan_pack.wan.model.latent_space import LATENT_SPACES, WAN21, WAN22
from wan_pack.wan.model.patch import patchify, token_grid
from wan_pack.wan.model.variants import VARIANTS, check_runs, takers
from wan_pack.wan.transformer.transformer import WanModel
from wan_pack.wan.vae.vae_keys import VaeInfo, vae_shapes

LARGEST = 1 << 20


def shapes_of(config: WanConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in WanModel(config).named_parameters()}


DECISIVE = {
    "head.modulation": 3, "blocks.0.ffn.0.weight": 2, "patch_embedding.weight": 5, "head.head.weight": 2,
    "text_embedding.0.weight": 2, "time_embedding.0.weight": 2,
}  # fmt: skip


@pytest.mark.parametrize(("name", "rank"), DECISIVE.items(), ids=DECISIVE)
def test_a_tensor_that_decides_a_size_is_there_and_of_a_size_that_can_be(name: str, rank: int):
    shapes = shapes_of(replace(TINY, dim=128, num_heads=1))
    without = {other: shape for other, shape in shapes.items() if other != name}
    with pytest.raises(ValueError, match=f"^tensor {name} is missing; a Wan transformer has it$"):
        config_from_shapes(without)
    for shape in ((*shapes[name], 1), shapes[name][1:], ()):
        with pytest.raises(ValueError, match=rf"^tensor {name} has shape \(.*\); it must have {rank} dimensions$"):
            config_from_shapes({**shapes, name: shape})
    for place in range(rank):
        for size in (0, LARGEST + 1):
            shape = (*shapes[name][:place], size, *shapes[name][place + 1 :])
            with pytest.raises(ValueError, match=rf"^tensor {name} has shape .*; its sizes must be 1 to {LARGEST}$"):
                config_from_shapes({**shapes, name: shape})
    assert config_from_shapes({**shapes, "blocks.0.ffn.0.weight": (LARGEST, 1)}).ffn_dim == LARGEST


def test_heads_are_of_128_channels_unless_a_file_says_how_many_there_are():
    shapes = shapes_of(replace(TINY, dim=384, num_heads=3))
    assert config_from_shapes(shapes).num_heads == 3 and config_from_shapes(shapes, num_heads=6).head_dim == 64
    with pytest.raises(ValueError, match=r"^dim is 32; without a config\.json it must be a multiple of 128$"):
        config_from_shapes(shapes_of(TINY))
    for heads in (5, 128):
        with pytest.raises(ValueError, match=f"^dim is 384 and num_heads is {heads}; dim must be an even multiple of"):
            config_from_shapes(shapes, num_heads=heads)


def test_as_many_blocks_are_read_as_any_model_may_have():
    shapes = shapes_of(replace(TINY, dim=128, num_heads=1))
    many = {f"blocks.{i}.x": (1,) for i in range(MAX_LAYERS)} | {"blocks.x.y": (1,), "blockss.7": (1,)}
    assert config_from_shapes({**shapes, **many}).num_layers == MAX_LAYERS == 1000


def test_vace_blocks_run_behind_blocks_that_are_there():
    shapes = shapes_of(TINY_VACE)

    def layers(told: tuple[int, ...] | None = None, more: int = 0) -> tuple[int, ...]:
        others = {f"vace_blocks.{2 + i}.x": (1,) for i in range(more)}
        return config_from_shapes({**shapes, **others}, num_heads=4, vace_layers=told).vace_layers

    assert layers((0, 4)) == (0, 4) and layers() == (0, 2) and layers(more=3) == (0, 1, 2, 3, 4)
    for told in ((0,), (0, 0), (0, 5), (1, 2), (0, 2, 1)):
        with pytest.raises(ValueError, match=r"its [23] VACE blocks run behind blocks \[.*\] of 5; vace_layers must"):
            layers(told, more=len(told) == 3)
    with pytest.raises(ValueError, match=r"its 7 VACE blocks run behind blocks \[0, 1, 2, 3, 4\] of 5"):
        layers(more=5)
    assert config_from_shapes(shapes_of(replace(TINY, dim=128, num_heads=1)), vace_layers=(0, 7)).vace_layers == ()


def test_models_that_are_called_the_same_are_told_apart_by_all_that_differs():
    other = replace(TINY, ffn_dim=96, num_heads=2, freq_dim=64)
    assert TINY.differences(other) == " (ffn_dim 80 and 96, num_heads 4 and 2, freq_dim 32 and 64)"
    assert TINY.differences(TINY) == " ()"
    assert takers("control_mask") == "VACE" and takers("nothing") == ""


@pytest.mark.parametrize(
    ("space", "size", "shape", "token"),
    [
        (WAN21, (832, 480, 81), (16, 21, 60, 104), 16), (WAN22, (1280, 704, 121), (48, 31, 44, 80), 32),
        (WAN21, (16, 32, 1), (16, 1, 4, 2), 16),
        (WAN21, (839, 487, 84), (16, 21, 60, 104), 16),
    ],
)  # fmt: skip
def test_latents_of_a_video(space, size: tuple[int, int, int], shape: tuple[int, ...], token: int):
    assert space.shape(*size) == shape and space.pixel_multiple == token
    assert LATENT_SPACES[shape[0]] is space


@pytest.mark.parametrize(("info", "rounded"), [
    (VaeInfo(WAN21, 96, 96, 1, "", True), 254), (VaeInfo(WAN22, 160, 256, 1, "", True), 1410),
])  # fmt: skip
def test_a_released_vae_takes_the_memory_that_is_planned(info: VaeInfo, rounded: int):
    """In millions of bytes."""
    parameters = sum(math.prod(shape) for shape in vae_shapes(info).values())
    assert round(2 * parameters / 1e6) == pytest.approx(rounded, abs=1) and info.kind.vae_bytes == rounded * 10**6


def test_a_tokens_channels_are_those_of_its_four_corners():
    latents = torch.arange(2 * 1 * 2 * 4.0).view(2, 1, 2, 4)
    assert patchify(latents).tolist() == [[0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]]
    for shape, words in (((16, 3, 5, 10), "5 x 10"), ((16, 3, 6, 9), "6 x 9")):
        with pytest.raises(ValueError, match=f"^latents are {words}; height and width must be even"):
            token_grid(shape)


def test_where_the_mask_is_among_the_channels_behind_the_latents():
    found = {name: (variant.image_latents, variant.mask_index) for name, variant in VARIANTS.items()}
    given = {"I2V": (1, 0), "Fun-Control": (2, 16), "Wan2.1 Fun-Control": (2, 0), "Fun-Camera": (1, 0)}
    given |= {"T2V": (0, 0), "Fun-InP 5B": (1, 0), "Fun-Control 5B": (2, 48), "Wan2.1 Fun-Camera": (1, 0)}
    assert {name: found[name] for name in given} == given


def test_a_tensor_of_another_rank_says_nothing_of_the_channels():
    """That it is damaged is said where sizes are read."""
    embedding, head = (32, 17, 1, 2, 2), (64, 32)
    for shapes in ({"patch_embedding.weight": embedding}, {"head.head.weight": head},
                   {"patch_embedding.weight": embedding, "head.head.weight": ()},
                   {"patch_embedding.weight": (), "head.head.weight": head}):  # fmt: skip
        check_runs(shapes)
    with pytest.raises(ValueError, match="it is a Wan variant with 17 latent channels in and 16 out"):
        check_runs({"patch_embedding.weight": embedding, "head.head.weight": head})
