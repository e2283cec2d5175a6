"""Fun-Control's control as ComfyUI-WanVideoWrapper's nodes hand it on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import TINY
from torch import Tensor
from wan_pack.distributed.job.job import Sampling
from wan_pack.nodes.host.status import Status
from wan_pack.nodes.sockets.clip_vision import clip_tensors
from wan_pack.nodes.sockets.fun_inputs import has_reference, reference_tensors
from wan_pack.nodes.sockets.images import image_tensors
from wan_pack.nodes.sockets.video_inputs import VideoInputs
from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.sampling.image_channels import Given, image_channels

A14B = replace(TINY, in_dim=52, parts=frozenset({"ref_conv"}))
V10 = replace(TINY, in_dim=48, parts=frozenset({"img_emb"}), clip_dim=64)
V11 = replace(V10, parts=frozenset({"img_emb", "ref_conv"}))
SAMPLING = Sampling(width=64, height=48, num_frames=9, steps=2, seed=1)
SHAPE = (16, 3, 6, 8)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CONTROL, PICTURE, REFERENCE = noise(1, *SHAPE), noise(2, *SHAPE), noise(3, 1, 16, 6, 8)


def embeds(**held: Any) -> dict[str, Any]:
    """Of WanVideoControlEmbeds."""
    control = {"control_images": CONTROL, "start_percent": 0.0, "end_percent": 1.0, "fun_ref_image": None, **held}
    return {"max_seq_len": 36, "target_shape": SHAPE, "num_frames": 9, "control_embeds": control}


def with_picture(mask: Tensor | None, **held: Any) -> dict[str, Any]:
    """Of WanVideoImageToVideoEncode behind it."""
    picture = {"image_embeds": PICTURE, "mask": mask, "clip_context": None, "lat_h": 6, "lat_w": 8, "end_image": None}
    return {**picture, "num_frames": 9, "max_seq_len": 36, "control_embeds": embeds(**held)["control_embeds"]}


def asked(value: Any, **inputs: Any) -> VideoInputs:
    return VideoInputs.of({"model": None, "gpu_count": 1, "image_embeds": value, **inputs})


def tensors(value: Any, config: WanConfig = A14B) -> dict[str, Tensor]:
    return image_tensors(asked(value), SAMPLING, config, Status())


def of_pixels(config: WanConfig, *, start: bool) -> Tensor:
    """What a job makes of a control video and a first frame that are encoded to these latents."""
    latents = {(1, 3, 9, 48, 64): CONTROL, (1, 3, 1, 48, 64): PICTURE[:, :1]}
    given = Given(
        start=torch.zeros(3, 48, 64) if start else None, control=torch.zeros(3, 9, 48, 64), num_frames=9, shape=SHAPE,
        encode=lambda video: latents[tuple(video.shape)][None],
    )  # fmt: skip
    return image_channels(config.variant, given)


@pytest.mark.parametrize("config", [A14B, V10, V11], ids=["A14B", "V1.0", "V1.1"])
def test_a_control_is_that_of_the_same_pixels(config: WanConfig):
    assert torch.equal(tensors(embeds(), config)["image_conditioning"], of_pixels(config, start=False))
    assert tensors(embeds(), config)["image_conditioning"].shape == (config.in_dim - 16, *SHAPE[1:])


@pytest.mark.parametrize("config", [A14B, V10], ids=["A14B", "V1.0"])
def test_a_first_frame_is_beside_it(config: WanConfig):
    mask = None
    if config is A14B:
        mask = torch.zeros(4, *SHAPE[1:])
        mask[:, 0] = 1
    value = with_picture(mask)
    value["image_embeds"] = torch.cat([PICTURE[:, :1], torch.zeros(16, 2, 6, 8)], dim=1)
    assert torch.equal(tensors(value, config)["image_conditioning"], of_pixels(config, start=True))


def test_a_reference_alone_has_nothing_to_follow():
    found = tensors(embeds(control_images=None, fun_ref_image=REFERENCE))
    assert torch.equal(found["reference_latent"], REFERENCE[0])
    assert torch.equal(found["image_conditioning"], torch.zeros(36, *SHAPE[1:]))
    given = asked(embeds(fun_ref_image=REFERENCE))
    assert has_reference(given, A14B) and not has_reference(asked(embeds()), A14B)
    assert not has_reference(given, V10)


def test_clip_sees_nothing_where_no_picture_is_handed_on():
    found = clip_tensors(asked(embeds()), V10, Status())
    assert torch.equal(found["clip_features"], torch.zeros(257, 64))
    seen = noise(5, 1, 257, 64)
    given = {**with_picture(None), "clip_context": seen}
    assert torch.equal(clip_tensors(asked(given), V10, Status())["clip_features"], seen[0])


@pytest.mark.parametrize(
    ("value", "config", "words"),
    [
        (embeds(), TINY, r"carries control_embeds, which this model \(T2V\) does not follow; choose a Fun-Control"),
        (embeds(control_camera_latents=CONTROL), A14B, "control_embeds of image_embeds carries control_camera_latents"),
        (embeds(start_percent=0.2), A14B, "start_percent of control_embeds of image_embeds is 0.2; it must be 0: e"),
        (embeds(end_percent=0.8), A14B, "end_percent of control_embeds of image_embeds is 0.8; it must be 1: every"),
        (embeds(control_images=noise(1, 16, 2, 6, 8)), A14B, "control_images of control_embeds is for 64x48, 5 frames"),
        (embeds(control_images=noise(1, 20, 3, 6, 8)), A14B, r"has shape \[20, 3, 6, 8\]; it must be a tensor \[16, T"),
        (embeds(control_images="fox"), A14B, "control_images of control_embeds is str"),
        ({**embeds(), "control_embeds": "fox"}, A14B, "control_embeds of image_embeds is str; it must be that of"),
        (embeds(fun_ref_image=REFERENCE), V10, r"carries fun_ref_image, which this model .* choose a Fun-Control, "),
        (embeds(fun_ref_image=REFERENCE[0]), A14B, r"has shape \[16, 6, 8\]; it must be a tensor \[1, 16, h, w\]"),
        (with_picture(torch.ones(4, *SHAPE[1:])), V10, "carries a mask, which this model .* has no channels for"),
        ({**with_picture(None), "end_image": PICTURE}, A14B, "were made for an end image outside the video"),
        ({**embeds(), "recammaster": CONTROL}, A14B, "image_embeds carries recammaster, which this node does not"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(value: Any, config: WanConfig, words: str):
    with pytest.raises(ValueError, match=words):
        tensors(value, config)


def test_a_reference_that_comes_twice_is_refused():
    text = [[torch.zeros(1, 4, 48), {"reference_latents": [noise(1, 1, 16, 1, 6, 8)]}]]
    with pytest.raises(ValueError, match="a reference picture comes twice: with image_embeds and with text_embeds"):
        reference_tensors(asked(embeds(fun_ref_image=REFERENCE), text_embeds=text), A14B)
