"""What a face does: the arithmetic beside diffusers', and what it is rounded to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.models.transformers.transformer_wan_animate import WanAnimateFaceEncoder, WanAnimateMotionEncoder
from tiny import TINY_ANIMATE
from torch import Tensor, nn
from wan_pack.wan.transformer.animate import FACE_ROWS, Face, FaceBlock, FaceEncoder, Pose
from wan_pack.wan.transformer.camera import Camera
from wan_pack.wan.transformer.context import Context
from wan_pack.wan.transformer.motion_encoder import COORDINATES, HALVINGS, MotionEncoder
from wan_pack.wan.transformer.reference import Reference
from wan_pack.wan.transformer.vace import Control

BF16 = torch.bfloat16
WIDTH = 64
"""Of a motion: the second convolution has as many channels, as all further ones."""


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_weights(module: nn.Module) -> nn.Module:
    for seed, parameter in enumerate(module.requires_grad_(False).parameters()):
        parameter.copy_(0.3 * noise(seed, *parameter.shape))
    return module


@torch.no_grad()
def copied(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        other.copy_(one.view(other.shape))


def test_motion_is_that_of_diffusers_encoder():
    """Whatever the pictures come in."""
    ours = with_weights(MotionEncoder(replace(TINY_ANIMATE, motion_dim=WIDTH)))
    for name, parameter in ours.named_parameters():
        # As they are trained: of unit size, so that what is seen outweighs the biases.
        parameter.mul_(0.1 if "bias" in name else 1 / 0.3)
    channels = {str(512 >> i): min(32 << i, WIDTH) for i in range(HALVINGS + 1)}
    theirs = WanAnimateMotionEncoder(512, WIDTH, COORDINATES, WIDTH, channels=channels).requires_grad_(False)
    directions, *others = theirs.parameters()
    copied(list(ours.parameters()), [*others, directions])
    pictures = nn.functional.interpolate(noise(1, 1, 3, 32, 32), size=(512, 512), mode="bilinear").clamp(-1, 1)
    expected, made = theirs(pictures), ours(pictures.double())
    assert made.shape == (1, WIDTH) and made.dtype == torch.float32
    moved = theirs(pictures.roll(1, dims=3))
    assert (moved - expected).abs().max() > 1e-3 * expected.abs().max(), "a pixel shows"
    torch.testing.assert_close(made, expected, rtol=0, atol=5e-5 * expected.abs().max().item())


@pytest.mark.parametrize("frames", [1, 4, 5, 8, 9])
def test_rows_are_those_of_diffusers_encoder(frames: int):
    ours = with_weights(FaceEncoder(TINY_ANIMATE))
    theirs = WanAnimateFaceEncoder(TINY_ANIMATE.motion_dim, TINY_ANIMATE.dim, TINY_ANIMATE.face_dim)
    copied(list(ours.parameters()), list(theirs.requires_grad_(False).parameters()))
    motion = noise(50, frames, TINY_ANIMATE.motion_dim)
    made = ours(motion)
    assert made.shape == ((frames + 3) // 4, FACE_ROWS + 1, TINY_ANIMATE.dim)
    torch.testing.assert_close(made, theirs(motion[None])[0], rtol=1e-4, atol=1e-4)


def test_what_is_added_to_the_residual_is_float32_whatever_the_products_are_in():
    encoder, block = (with_weights(module(TINY_ANIMATE)) for module in (FaceEncoder, FaceBlock))
    exact = encoder(noise(50, 5, TINY_ANIMATE.motion_dim))
    rows = encoder.to(BF16)(noise(50, 5, TINY_ANIMATE.motion_dim))
    assert rows.dtype == torch.float32 and ((rows - exact).norm() / exact.norm()).item() < 0.02
    face = Face(torch.zeros(3, 1, 1, 1), 2, None, ((0, 3), (1, 3)), torch.arange(2))
    x = noise(51, 6, TINY_ANIMATE.dim)
    exact = block(x, exact, face)
    for layer in (block.linear1_kv, block.linear1_q, block.linear2):
        layer.to(BF16)
        layer.register_forward_pre_hook(lambda layer, given: (given[0].to(BF16),))
    added = block(x, rows, face)
    assert added.dtype == torch.float32 and ((added - exact).norm() / exact.norm()).item() < 0.05


def test_pictures_reach_the_encoder_a_few_at_a_time():
    """In the order of the frames, and once however often they are asked for."""
    seen: list[list[float]] = []

    class Motion(nn.Module):
        def forward(self, pictures: Tensor) -> Tensor:
            seen.append(pictures[:, 0, 0, 0].tolist())
            return pictures[:, :1, 0, 0]

    video = torch.arange(9.0).view(1, 9, 1, 1).expand(3, 9, 2, 2)
    face = Face(video, 10)
    made = [face.rows(Motion(), nn.Unflatten(1, (1, 1)), torch.device("cpu")) for _ in range(2)]
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8]] and made[0] is made[1]
    assert made[0].flatten().tolist() == [0, *range(9)]


def test_what_every_evaluation_reads_is_on_the_device_and_what_is_read_once_is_not():
    meta, order = torch.device("meta"), torch.tensor([1, 0])
    face = Face(torch.zeros(3, 1, 1, 1), 2, order, ((0, 1), (1, 1)), order).on_device(meta)
    assert face.order is not None and face.here is not None
    assert (face.order.device, face.here.device, face.pictures.device.type) == (meta, meta, "cpu")
    assert face.frames == 2 and face.runs == ((0, 1), (1, 1))
    pose = Pose(torch.zeros(2, 64), order).on_device(meta)
    assert pose.rows is not None and (pose.values.device, pose.rows.device) == (meta, meta)
    camera = Camera(torch.zeros(1, 1, 2, 8), 8, order).on_device(meta)
    assert camera.rows is not None and (camera.values.device.type, camera.rows.device) == ("cpu", meta)
    reference = Reference(torch.zeros(2, 64), order).on_device(meta)
    assert reference.rows is not None and (reference.values.device, reference.rows.device) == (meta, meta)
    assert Control(torch.zeros(2, 384), 0.5).on_device(meta).values.device == meta
    assert Context(torch.zeros(2, 4), keep=False).on_device(meta).tokens.device == meta
    for part in (Face(face.pictures, 2), Pose(face.pictures), Camera(face.pictures, 8), Reference(face.pictures)):
        part.on_device(meta)


def test_bytes_are_of_what_is_on_the_device_with_what_is_derived():
    """Not of pictures and rays, which stay in the host's memory."""
    meta, order = torch.device("meta"), torch.tensor([1, 0])
    rows, values, derived = 2 * 8, 2 * 64 * 4, torch.zeros(3, 5, 7, device=meta)
    assert Pose(torch.zeros(2, 64), order).on_device(meta).device_bytes() == values + rows
    assert Reference(torch.zeros(2, 64), order).on_device(meta).device_bytes() == values + rows
    assert Control(torch.zeros(2, 64)).on_device(meta).device_bytes() == values
    face = Face(torch.zeros(3, 1, 1, 1), 2, order, ((0, 1), (1, 1)), order).on_device(meta)
    assert face.device_bytes() == 2 * rows
    face.rows(nn.Identity(), lambda motion: derived[1:2], meta)  # type: ignore[arg-type]
    assert face.device_bytes() == 2 * rows + 2 * 5 * 7 * 4
    camera = Camera(torch.zeros(1, 1, 2, 8), 8, order).on_device(meta)
    assert camera.device_bytes() == rows
    camera.added_to(torch.zeros(2, 7, device=meta), lambda frame: frame.new_zeros(2, 7))  # type: ignore[arg-type]
    assert camera.device_bytes() == rows + 2 * 7 * 4
    context = Context(torch.zeros(2, 4)).on_device(meta)
    assert context.device_bytes() == 2 * 4 * 4
    context.embedded(lambda tokens: derived[0])  # type: ignore[arg-type]
    for layer in (nn.Identity(), nn.Identity()):
        context.keys_values(layer, lambda: (derived, derived))
    assert context.device_bytes() == 4 * (2 * 4 + 5 * 7 + 4 * 3 * 5 * 7)
