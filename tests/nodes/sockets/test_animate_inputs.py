"""What Animate's conditioning holds: poses and a face, the latter twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import TINY
from wan_pack.distributed.job.job import Sampling
from wan_pack.nodes.host.status import Status
from wan_pack.nodes.sockets.animate_inputs import animate_tensors
from wan_pack.nodes.sockets.images import image_tensors
from wan_pack.nodes.sockets.vace_inputs import control_size
from wan_pack.nodes.sockets.video_inputs import VideoInputs
from wan_pack.wan.model.variants import VARIANTS
from wan_pack.wan.vae.latents import normalise

ANIMATE = replace(TINY, in_dim=36, parts=VARIANTS["Animate"].parts, face_blocks=1)
SAMPLING = Sampling(width=64, height=48, num_frames=9, steps=2, seed=1)
POSE, FACE = torch.rand(1, 16, 3, 6, 8), torch.rand(1, 3, 2, 512, 512)


def text(**extras: Any) -> list[Any]:
    return [[torch.zeros(1, 4, 48), extras]]


def asked(**inputs: Any) -> Any:
    return VideoInputs.of({"model": None, "text_embeds": text(), "gpu_count": 1, **inputs})


def test_each_prompt_has_a_face_and_both_have_one_pose() -> None:
    found = animate_tensors(
        asked(
            text_embeds=text(pose_video_latent=POSE, face_video_pixels=FACE),
            negative_embeds=text(pose_video_latent=POSE.clone(), face_video_pixels=FACE * 0 - 1),
        ),
        ANIMATE,
    )
    assert torch.equal(found["pose_video_latent"], normalise(POSE[0], 16))
    assert torch.equal(found["face_video_pixels"], FACE[0]) and bool(found["face_video_pixels_null"].eq(-1).all())
    # Without guidance nothing is asked of the negative prompt.
    assert animate_tensors(asked(text_embeds=text(face_video_pixels=FACE)), ANIMATE).keys() == {"face_video_pixels"}
    assert animate_tensors(asked(), ANIMATE) == {}


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (
            {"text_embeds": text(pose_video_latent=POSE), "negative_embeds": text(pose_video_latent=POSE + 1)},
            "another pose or face than text_embeds; connect both outputs of WanAnimateToVideo",
        ),
        ({"text_embeds": text(face_video_pixels=FACE), "negative_embeds": text()}, "connect both outputs"),
        ({"negative_embeds": text(face_video_pixels=FACE)}, "connect both outputs"),
        (
            {"text_embeds": text(pose_video_latent=POSE[:, :8])},
            r"pose_video_latent of text_embeds has shape .*\[1, 16, T, h, w\]",
        ),
        (
            {"text_embeds": text(face_video_pixels=FACE[0])},
            r"face_video_pixels of text_embeds has shape .*\[1, 3, F, 512, 512\]",
        ),
        ({"text_embeds": text(face_video_pixels=3)}, "face_video_pixels of text_embeds is int"),
    ],
)
def test_what_cannot_be_taken_over_is_refused(inputs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        animate_tensors(asked(**inputs), ANIMATE)


def test_embeds_of_the_wrapper_are_refused_by_name() -> None:
    """Those of its node for Animate: masks, strengths and windows of its own."""
    embeds = {"pose_latents": POSE[0], "face_pixels": FACE, "ref_latent": POSE[0], "target_shape": (16, 4, 6, 8)}
    with pytest.raises(ValueError, match=r"carries \[?.*face_pixels.*pose_latents.*ref_latent.*does not support"):
        image_tensors(asked(image_embeds=embeds), SAMPLING, ANIMATE, Status())


def test_the_latents_have_a_frame_in_front() -> None:
    latents, mask = torch.rand(1, 16, 4, 6, 8), torch.rand(1, 4, 4, 6, 8)
    given = asked(text_embeds=text(concat_latent_image=latents, concat_mask=mask))
    found = image_tensors(given, SAMPLING, ANIMATE, Status())["image_conditioning"]
    assert torch.equal(found, torch.cat((1 - mask[0], normalise(latents[0], 16))))
    assert control_size(given, {}, SAMPLING, ANIMATE) == (0, 1)
    short = asked(text_embeds=text(concat_latent_image=latents[:, :, 1:], concat_mask=mask[:, :, 1:]))
    with pytest.raises(ValueError, match="concat_latent_image of text_embeds is for 64x48, 5 frames; this node makes"):
        image_tensors(short, SAMPLING, ANIMATE, Status())


@pytest.mark.parametrize("more", [1, 2])
def test_too_many_latents_are_another_length_first_and_then_several_pictures(more: int) -> None:
    """Of more than one picture ComfyUI's node makes further latent frames in front, as of a longer video."""
    frames = 4 + more
    told = text(concat_latent_image=torch.zeros(1, 16, frames, 6, 8), concat_mask=torch.ones(1, 4, frames, 6, 8))
    words = (
        rf"^concat_latent_image of text_embeds is for 64x48, {9 + 4 * more} frames; this node makes 64x48, 9 frames\. "
        r"Set both to the same: length of WanAnimateToVideo and num_frames\. .*reference_image.*Animate\) takes a"
    )
    with pytest.raises(ValueError, match=words):
        image_tensors(asked(text_embeds=told), SAMPLING, ANIMATE, Status())
