"""A reference picture in front of the video: whose tokens it is, and that nothing of it comes out."""

from __future__ import annotations

import pytest
import torch
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.wan.transformer.animate import Pose
from wan_pack.wan.transformer.camera import Camera
from wan_pack.wan.transformer.conditions import NONE, Conditions
from wan_pack.wan.transformer.patch_embedding import PatchEmbedding
from wan_pack.wan.transformer.reference import Reference

SHAPE = (16, 2, 6, 10)
"""Of the video's latents: 15 tokens a frame."""
CPU = torch.device("cpu")


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def embedding() -> PatchEmbedding:
    made = PatchEmbedding(16, 8, (2, 2))
    made.weight.data, made.bias.data = noise(1, 8, 16, 2, 2), noise(2, 8)
    return made.requires_grad_(False)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 8, 50])
def test_every_rank_has_its_tokens_of_the_picture(world: int, shuffled: bool):
    conditions = Conditions(reference=Reference(noise(3, 16, 1, 6, 10)))
    grid = conditions.grid(SHAPE)
    assert grid == (3, 3, 5)
    order = torch.randperm(45, generator=torch.Generator().manual_seed(4)) if shuffled else None
    picture = torch.nn.functional.conv2d(noise(3, 16, 6, 10)[None], embedding().weight, embedding().bias, stride=2)
    video = noise(5, 30, 8)
    expected = torch.cat((picture[0].flatten(1).T, video))
    parts = []
    for rank in range(world):
        shard = SequenceShard(length=45, rank=rank, world=world, order=order)
        reference = conditions.on_rank(shard.split, shard.length, CPU).reference
        assert reference is not None
        x = reference.put_into(shard.split(torch.cat((noise(6, 15, 8), video))), embedding())
        parts.append(x)
        # Nothing that the model says of it is kept.
        assert int((reference.taken_out(torch.ones_like(x))[:, 0] == 0).sum()) == len(reference.values)
    whole = torch.cat(parts)[:45]
    torch.testing.assert_close(whole, expected if order is None else expected[order])


def test_what_is_put_into_the_residual_is_float32_whatever_the_products_are_in():
    """Also behind a camera and a pose."""
    latents, x = noise(3, 16, 1, 6, 10), noise(4, 45, 8)

    def here(tokens: torch.Tensor) -> torch.Tensor:
        return tokens

    exact = Reference(latents).on_rank(here, 45).put_into(x, embedding())
    rounded = Reference(latents).on_rank(here, 45).put_into(x, embedding().bfloat16())
    assert rounded.dtype == torch.float32 and torch.equal(rounded[15:], x[15:])
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=0.2)
    pose = Pose(noise(5, 16, 2, 6, 10)).on_rank(here, 45)
    added = [pose.added_to(x, embedding().to(dtype)) for dtype in (torch.float32, torch.bfloat16)]
    assert added[1].dtype == torch.float32 and torch.equal(added[1][:15], x[:15])
    torch.testing.assert_close(added[1], added[0], rtol=2e-2, atol=0.2)
    camera = Camera(noise(6, 2, 3, 48, 80), 8).on_rank(here, 45)
    for _ in range(2):
        assert camera.added_to(x, lambda frame: torch.ones(15, 8).bfloat16()).equal(x + 1)


def test_what_is_sampled_is_the_video_alone():
    latents = noise(1, *SHAPE)
    for conditions in (NONE, Conditions(reference=Reference(noise(3, 16, 1, 6, 10)))):
        tokens = conditions.tokens(latents)
        assert torch.equal(conditions.latents(tokens, conditions.grid(SHAPE)), latents)
