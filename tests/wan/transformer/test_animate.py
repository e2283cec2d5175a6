"""Poses and faces: whose tokens they are for, on any rank and in any order; what a file may and must hold."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY, TINY_ANIMATE, random_weights
from torch import Tensor
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.wan.model.config import config_from_shapes
from wan_pack.wan.transformer.animate import Face, FaceBlock, Pose
from wan_pack.wan.transformer.conditions import Conditions
from wan_pack.wan.transformer.patch_embedding import PatchEmbedding
from wan_pack.wan.transformer.transformer import WanModel

CPU = torch.device("cpu")


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shards(world: int, *, shuffled: bool) -> list[SequenceShard]:
    order = torch.randperm(45, generator=torch.Generator().manual_seed(4)) if shuffled else None
    return [SequenceShard(length=45, rank=rank, world=world, order=order) for rank in range(world)]


def in_order(parts: list[Tensor], shard: SequenceShard) -> Tensor:
    whole = torch.cat(parts)[:45]
    return whole if shard.order is None else torch.empty_like(whole).index_copy_(0, shard.order, whole)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 50])
@pytest.mark.parametrize("frames", [1, 2])
def test_a_pose_is_added_behind_the_frame_in_front(world: int, shuffled: bool, frames: int):
    embedding = PatchEmbedding(16, 8).requires_grad_(False)
    embedding.weight.copy_(noise(1, 8, 16, 1, 2, 2))
    embedding.bias.copy_(noise(2, 8))
    latents = noise(3, 16, frames, 6, 10)
    expected = torch.ones(45, 8)
    embedded = torch.nn.functional.conv3d(latents[None], embedding.weight, embedding.bias, stride=(1, 2, 2))
    expected[15 : 15 * (1 + frames)] += embedded[0].flatten(1).T
    parts = []
    for shard in shards(world, shuffled=shuffled):
        pose = Conditions(pose=Pose(latents)).on_rank(shard.split, 45, CPU).pose
        assert pose is not None
        parts.append(pose.added_to(torch.ones(shard.size, 8), embedding))
    torch.testing.assert_close(in_order(parts, shard), expected)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 50])
def test_tokens_attend_to_their_own_frames_rows(world: int, shuffled: bool):
    block = FaceBlock(TINY_ANIMATE).requires_grad_(False)
    for seed, parameter in enumerate(block.parameters()):
        parameter.copy_(0.3 * noise(seed, *parameter.shape) + (parameter.ndim == 1))
    x, rows = noise(20, 45, TINY.dim), noise(21, 3, 5, TINY.dim)
    heads = TINY.num_heads

    def split(y: Tensor) -> Tensor:
        return y.unflatten(-1, (heads, -1)).transpose(-3, -2)

    def normed(y: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(y, (TINY.dim,), eps=1e-6)

    q = block.q_norm(split(block.linear1_q(normed(x)))).unflatten(1, (3, 15)).transpose(0, 1)
    k, v = (split(y) for y in block.linear1_kv(normed(rows).flatten(0, 1)).unflatten(0, (3, 5)).chunk(2, dim=-1))
    weights = (q @ block.k_norm(k).mT / TINY.head_dim**0.5).softmax(-1)
    expected = block.linear2((weights @ v).transpose(1, 2).flatten(0, 1).flatten(1))
    parts = []
    for shard in shards(world, shuffled=shuffled):
        face = Conditions(face=Face(torch.zeros(3, 1, 1, 1), 3)).on_rank(shard.split, 45, CPU).face
        assert face is not None and sum(count for _, count in face.runs) == shard.size
        assert (face.order is None) is (not shuffled) or shard.size == 1
        parts.append(block(shard.split(x), rows, face))
    torch.testing.assert_close(in_order(parts, shard), expected)


def test_each_prompt_has_its_face_and_it_is_encoded_once():
    asked: list[int] = []

    class Encoder(torch.nn.Module):
        def forward(self, pictures: Tensor) -> Tensor:
            asked.append(len(pictures))
            return pictures[:, 0]

    video = torch.arange(7.0).view(1, 7, 1, 1).expand(3, 7, 2, 2)
    conditions = Conditions(face=Face(video, 4), instead={"face": Face(-video, 4)}, pose=Pose(noise(1, 16, 3, 2, 2)))
    besides = conditions.on_rank(lambda tokens: tokens, 4, CPU).besides(keep=True)
    assert besides[True].pose is besides[False].pose
    for conditional, sign in ((True, 1), (False, -1)):
        face = besides[conditional].face
        assert face is not None
        for _ in range(2):
            rows = face.rows(Encoder(), torch.nn.Identity(), CPU)
            # None in front, and no more than the video has.
            assert rows[:, 0, 0].tolist() == [0, 0, sign * 1, sign * 2]
    assert asked == [4, 3] * 2
    alone = Conditions(face=Face(video, 4), instead={"face": None}).besides(keep=True)
    assert alone[True].face is not None and alone[False].face is None


def test_a_short_face_is_followed_by_nothing():
    face = Face(torch.ones(3, 1, 2, 2), 4)
    rows = face.rows(torch.nn.Identity(), torch.nn.Flatten(2), CPU)
    assert rows.shape == (4, 3, 4) and rows[:, 0, 0].tolist() == [0, 1, 0, 0]


def test_its_blocks_are_sharded_and_streamed_by_themselves():
    with torch.device("meta"):
        model = WanModel(TINY_ANIMATE)
    adapter = model.face_adapter.fuser_blocks
    assert model.units == [model.blocks[0], adapter[0], *model.blocks[1:], adapter[1]]
    assert model.running_order == list(model.blocks)


def test_without_a_face_nothing_is_added():
    block = FaceBlock(TINY_ANIMATE)
    assert block(noise(1, 4, TINY_ANIMATE.dim), None, None) is None


def test_there_is_a_block_of_the_adapter_behind_every_fifth():
    shapes = {name: tuple(tensor.shape) for name, tensor in random_weights(TINY_ANIMATE).items()}
    assert config_from_shapes(shapes, num_heads=TINY.num_heads) == TINY_ANIMATE
    short = {name: shape for name, shape in shapes.items() if "fuser_blocks.1." not in name}
    with pytest.raises(
        ValueError, match="it has 1 blocks of a face adapter; Wan Animate has one behind every 5th of its 6"
    ):
        config_from_shapes(short, num_heads=TINY.num_heads)


def test_the_motion_encoder_is_float32():
    from wan_pack.wan.transformer.transformer import meta_model

    model = meta_model(TINY_ANIMATE, torch.bfloat16)
    assert {parameter.dtype for parameter in model.motion_encoder.parameters()} == {torch.float32}
    assert model.face_adapter.fuser_blocks[0].linear2.weight.dtype == torch.bfloat16
    assert model.face_adapter.fuser_blocks[0].q_norm.weight.dtype == torch.float32
    assert isinstance(model, WanModel)
