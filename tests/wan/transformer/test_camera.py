"""Where the camera is: which frames' rays a rank needs, and that they are embedded once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import TINY
from torch import Tensor
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.wan.transformer.camera import Camera, CameraAdapter
from wan_pack.wan.transformer.conditions import Conditions

CONFIG = replace(TINY, in_dim=36, parts=frozenset({"control_adapter"}), camera_dim=2 * 64)
CPU = torch.device("cpu")


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapter() -> CameraAdapter:
    made = CameraAdapter(CONFIG).requires_grad_(False)
    for seed, parameter in enumerate(made.parameters()):
        parameter.copy_(0.1 * noise(seed, *parameter.shape))
    return made


def expected(rays: Tensor) -> Tensor:
    """[L, C], by torch's own layers, of all frames at once."""
    layers = adapter()
    frames = torch.nn.PixelUnshuffle(8)(rays.movedim(0, 1))
    x = torch.nn.functional.conv2d(frames, layers.conv.weight, layers.conv.bias, stride=2)
    block = layers.residual_blocks[0]
    x = x + block.conv2(block.conv1(x).relu())
    return x.permute(0, 2, 3, 1).flatten(0, 2)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 50])
def test_every_rank_adds_what_its_tokens_get(world: int, shuffled: bool):
    rays = noise(1, 2, 3, 48, 80)
    order = torch.randperm(45, generator=torch.Generator().manual_seed(4)) if shuffled else None
    parts = []
    for rank in range(world):
        shard = SequenceShard(length=45, rank=rank, world=world, order=order)
        camera = Conditions(camera=Camera(rays, 8)).on_rank(shard.split, shard.length, CPU).camera
        assert camera is not None
        parts.append(camera.added_to(torch.ones(shard.size, TINY.dim), adapter()))
        if not shuffled and world > 4:
            # Of one frame or two of the three.
            assert len(camera.values) <= 2
    whole, all_of_it = torch.cat(parts)[:45], 1 + expected(rays)
    torch.testing.assert_close(whole, all_of_it if order is None else all_of_it[order])


@pytest.mark.parametrize("keep", [True, False])
def test_it_is_embedded_once_where_that_is_kept(keep: bool):
    asked = []

    class Counted(torch.nn.Module):
        def forward(self, frame: Tensor) -> Tensor:
            asked.append(frame)
            return torch.ones(15, TINY.dim)

    conditions = Conditions(camera=Camera(noise(1, 2, 3, 48, 80), 8)).on_rank(lambda tokens: tokens, 45, CPU)
    for _ in range(2):
        # For each of two experts, whose embeddings differ.
        camera = conditions.beside(keep=keep).camera
        assert camera is not None
        for _ in range(2):
            assert torch.equal(camera.added_to(torch.ones(45, TINY.dim), Counted()), torch.full((45, TINY.dim), 2.0))
    assert len(asked) == 2 * 3 * (1 if keep else 2)
