"""Tensors that other nodes hand on, in every socket that reads one: any dtype, any layout in memory, no other shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from node_inputs import rows, sampling
from tiny import TINY, TINY_VACE
from torch import Tensor
from wan_pack.nodes.host.status import Status
from wan_pack.nodes.sockets.animate_inputs import animate_tensors
from wan_pack.nodes.sockets.clip_vision import clip_tensors
from wan_pack.nodes.sockets.fun_inputs import camera_tensors, reference_tensors
from wan_pack.nodes.sockets.images import image_tensors
from wan_pack.nodes.sockets.latent_input import latent_tensors
from wan_pack.nodes.sockets.vace_inputs import carried_control, own_control
from wan_pack.nodes.sockets.video_inputs import VideoInputs
from wan_pack.wan.model.variants import VARIANTS

SIZE, SIZE_5B = (2, 6, 8), (2, 3, 4)
I2V = replace(TINY, in_dim=36)
TI2V = replace(TINY, in_dim=48, out_dim=48)
CONTROL = replace(TINY, in_dim=52, parts=frozenset({"ref_conv"}))
WITHOUT_MASK = replace(TINY, in_dim=48, parts=frozenset({"img_emb"}))
ANIMATE = replace(TINY, in_dim=36, parts=VARIANTS["Animate"].parts, face_blocks=1)
WITH_CLIP = replace(I2V, parts=frozenset({"img_emb"}), clip_dim=64)
PICTURE, MASK = torch.rand(1, 16, *SIZE), torch.rand(1, 4, *SIZE).movedim(-3, -1).contiguous().movedim(-1, -3)
"""The mask with a pixel's frames behind one another."""


BESIDE = {"image_embeds": PICTURE[0].movedim(-3, -1).contiguous().movedim(-1, -3), "mask": MASK[0]}


def asked(**inputs: Any) -> VideoInputs:
    return VideoInputs.of({"model": None, **inputs})


def text(**extras: Any) -> VideoInputs:
    return asked(text_embeds=[[rows(3)[None], extras]])


def images(config: Any, given: VideoInputs) -> Tensor:
    (found,) = image_tensors(given, sampling(), config, Status()).values()
    return found


def control(**held: Any) -> dict[str, Any]:
    return {"control_embeds": {"control_images": None, "start_percent": 0.0, "end_percent": 1.0, **held}}


def vace(**changes: Any) -> Tensor:
    carried = {"vace_frames": [torch.zeros(1, 32, *SIZE)], "vace_mask": [torch.zeros(1, 64, *SIZE)]}
    return carried_control(text(**{**carried, "vace_strength": [1.0], **changes}))["vace_context"]


def noise_mask(value: Tensor) -> Tensor:
    latent = {"samples": torch.ones(1, 48, *SIZE_5B), "noise_mask": value}
    return latent_tensors(latent, sampling(), TI2V, Status())["noise_mask"]


def own(name: str, value: Tensor) -> Tensor:
    video = {"control_video": torch.zeros(5, 48, 64, 3), name: value}
    return own_control(asked(**video), sampling(), TINY_VACE, Status())[name]


@dataclass(frozen=True)
class Socket:
    """Where a tensor comes in."""

    read: Callable[[Tensor], Tensor]
    """What a job gets of it."""
    shape: tuple[int, ...]
    name: str
    """In a message that refuses another shape."""
    several: bool = False
    """More of them may come than one."""


SOCKETS = {
    "concat_latent_image": Socket(
        lambda it: images(I2V, text(concat_latent_image=it, concat_mask=MASK)), (1, 16, *SIZE),
        r"concat_latent_image of text_embeds has shape .* takes \[1, 16, T, h, w\]",
    ),
    "concat_latent_image of Wan2.1": Socket(
        lambda it: images(WITHOUT_MASK, text(concat_latent_image=it)), (1, 32, *SIZE),
        r"concat_latent_image of text_embeds has shape .* takes \[1, 32, T, h, w\]",
    ),
    "concat_mask": Socket(
        lambda it: images(I2V, text(concat_latent_image=PICTURE, concat_mask=it)), (1, 4, *SIZE),
        r"concat_mask of .* must be \[1, 1, 2, 6, 8\] or \[1, 4, 2, 6, 8\]",
    ),
    "image_embeds": Socket(
        lambda it: images(I2V, asked(image_embeds={"image_embeds": it, "mask": MASK[0]})),
        (16, *SIZE), "image_embeds hold tensors of the shapes .* of one size|channels; they must have 20",
    ),
    "reference_latents": Socket(
        lambda it: reference_tensors(text(reference_latents=[it]), CONTROL)["reference_latent"], (1, 16, 1, 6, 8),
        r"reference_latents of text_embeds has shape .* must be a tensor \[1, 16, 1, h, w\]",
    ),
    "camera_conditions": Socket(
        lambda it: camera_tensors(text(camera_conditions=it), sampling())["camera_conditions"], (1, 24, 2, 48, 64),
        "camera_conditions of text_embeds has shape .* must be what WanCameraEmbedding gives",
    ),
    "pose_video_latent": Socket(
        lambda it: animate_tensors(text(pose_video_latent=it), ANIMATE)["pose_video_latent"], (1, 16, *SIZE),
        r"pose_video_latent of text_embeds has shape .* must be a tensor \[1, 16, T, h, w\]",
    ),
    "face_video_pixels": Socket(
        lambda it: animate_tensors(text(face_video_pixels=it), ANIMATE)["face_video_pixels"], (1, 3, 1, 512, 512),
        r"face_video_pixels of text_embeds has shape .* must be a tensor \[1, 3, F, 512, 512\]",
    ),
    "control_images": Socket(
        lambda it: images(CONTROL, asked(image_embeds={**BESIDE, **control(control_images=it)})), (16, *SIZE),
        r"control_images of control_embeds has shape .* must be a tensor \[16, T, h, w\]",
    ),
    "image_embeds and control_embeds": Socket(
        lambda it: images(CONTROL, asked(image_embeds={"image_embeds": it, **control()})), (16, *SIZE),
        r"image_embeds of image_embeds has shape .* must be a tensor \[16, T, h, w\]",
    ),
    "mask and control_embeds": Socket(
        lambda it: images(CONTROL, asked(image_embeds={"mask": it, **control()})), (4, *SIZE),
        r"mask of image_embeds has shape .* must be a tensor \[4, T, h, w\]",
    ),
    "fun_ref_image": Socket(
        lambda it: image_tensors(asked(image_embeds=control(fun_ref_image=it)), sampling(), CONTROL, Status())[
            "reference_latent"
        ],
        (1, 16, 6, 8), r"fun_ref_image of control_embeds has shape .* must be a tensor \[1, 16, h, w\]",
    ),
    "vace_frames": Socket(
        lambda it: vace(vace_frames=[it]), (1, 32, *SIZE),
        r"vace_frames of text_embeds has shape .* must be \[1, 32, T, h, w\]",
    ),
    "vace_mask": Socket(
        lambda it: vace(vace_mask=[it]), (1, 64, *SIZE),
        r"vace_mask of text_embeds has shape .* must be \[1, 64, T, h, w\]",
    ),
    "vace_context": Socket(
        lambda it: carried_control(asked(image_embeds={"vace_context": [it]}))["vace_context"], (96, *SIZE),
        r"vace_context of image_embeds has shape .* must be \[96, T, h, w\]",
    ),
    "samples": Socket(
        lambda it: latent_tensors({"samples": it}, sampling(), TINY, Status())["samples"], (1, 16, *SIZE),
        r"samples is of shape .* must be a video's LATENT|samples hold 2 videos",
    ),
    "noise_mask": Socket(
        noise_mask, (1, 1, *SIZE_5B), r"noise_mask of shape .* must be \[1, 1, 2, 3, 4\]",
    ),
    "clip_vision_start_image": Socket(
        lambda it: clip_tensors(
            asked(clip_vision_start_image=SimpleNamespace(penultimate_hidden_states=it)), WITH_CLIP, Status()
        )["clip_features"],
        (1, 257, 64), r"clip_vision_start_image has the shape .* must be features \[1, n, C\]",
    ),
    "clip_vision_output": Socket(
        lambda it: clip_tensors(
            text(clip_vision_output=SimpleNamespace(penultimate_hidden_states=it)), WITH_CLIP, Status()
        )["clip_features"],
        (1, 257, 64), r"clip_vision_output of text_embeds has the shape .* must be features \[1, n, C\]",
    ),
    "start_image": Socket(
        lambda it: images(I2V, asked(start_image=it)), (1, 48, 64, 3),
        r"start_image is \[.* must be an IMAGE \[1, H, W, 3\]", several=True,
    ),
    "control_video": Socket(
        lambda it: own("control_video", it), (5, 48, 64, 3),
        r"control_video is \[.* must be an IMAGE \[F, H, W, 3\]", several=True,
    ),
    "control_mask": Socket(
        lambda it: own("control_mask", it), (5, 48, 64),
        r"control_mask is \[.* must be a MASK \[F, H, W\]", several=True
    ),
    "reference_images": Socket(
        lambda it: own("reference_images", it), (2, 48, 64, 3),
        r"reference_images is \[.* must be an IMAGE \[n, H, W, 3\]", several=True,
    ),
}  # fmt: skip
some = pytest.mark.parametrize("name", SOCKETS)


@some
def test_a_job_gets_float32_that_lies_together(name: str):
    socket = SOCKETS[name]
    value = torch.rand(socket.shape, generator=torch.Generator().manual_seed(0))
    assert socket.read(value).abs().sum() > 0
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        found = socket.read(value.to(dtype))
        assert found.dtype == torch.float32 and torch.equal(found, socket.read(value.to(dtype).float())), dtype
    # As a video's frames or a picture's channels lie behind one another.
    for first, last in ((-3, -1), (-1, -2)):
        other = value.movedim(first, last).contiguous().movedim(last, first)
        found = socket.read(other)
        assert found.is_contiguous() and torch.equal(found, socket.read(value))


@some
def test_another_shape_is_refused(name: str):
    socket = SOCKETS[name]
    value = torch.rand(socket.shape)
    wrong = [value[None], *(value.narrow(place, 0, 0) for place in range(value.ndim))]
    # Rows of what CLIP sees may come by themselves.
    wrong += [] if name.startswith("clip_vision") else [value[0]]
    wrong += [] if socket.several else [torch.cat([value, value])]
    for one in wrong:
        with pytest.raises(ValueError, match=socket.name):
            socket.read(one)


def test_the_same_picture_may_come_in_two_precisions():
    """With the prompt and the negative prompt."""
    latents = torch.rand(1, 16, 1, 6, 8).half()
    both = {"text_embeds": latents, "negative_embeds": latents.float()}
    given = asked(**{name: [[rows(3)[None], {"reference_latents": [it]}]] for name, it in both.items()})
    assert reference_tensors(given, CONTROL)["reference_latent"].shape == (16, 6, 8)
