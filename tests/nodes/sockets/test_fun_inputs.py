"""What Fun models' conditioning holds: a control video, a first frame, a reference picture, a camera."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import TINY
from wan_pack.distributed.job.job import Sampling
from wan_pack.nodes.host.status import Status
from wan_pack.nodes.sockets.fun_inputs import camera_tensors, has_reference, reference_tensors
from wan_pack.nodes.sockets.images import image_tensors
from wan_pack.nodes.sockets.vace_inputs import own_control
from wan_pack.nodes.sockets.video_inputs import VideoInputs
from wan_pack.wan.vae.latents import normalise

CONTROL = replace(TINY, in_dim=52, parts=frozenset({"ref_conv"}))
V10 = replace(TINY, in_dim=48, parts=frozenset({"img_emb"}))
SAMPLING = Sampling(width=64, height=48, num_frames=9, steps=2, seed=1)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(**extras: Any) -> list[Any]:
    return [[torch.zeros(1, 4, 48), extras]]


def asked(**inputs: Any) -> Any:
    return VideoInputs.of({"model": None, "text_embeds": text(), "gpu_count": 1, **inputs})


def test_the_last_reference_is_taken():
    latents = noise(1, 1, 16, 1, 6, 8)
    given = asked(text_embeds=text(reference_latents=[noise(2, 1, 16, 1, 6, 8), latents]))
    assert has_reference(given, CONTROL) and not has_reference(given, TINY) and not has_reference(asked(), CONTROL)
    assert torch.equal(reference_tensors(given, CONTROL)["reference_latent"], normalise(latents[0], 16)[:, 0])
    assert reference_tensors(asked(), CONTROL) == {}


@pytest.mark.parametrize(
    ("inputs", "config", "words"),
    [
        (
            {"text_embeds": text(reference_latents=[noise(1, 1, 16, 1, 6, 8)])},
            TINY,
            r"\(T2V\) does not take; choose a Fun",
        ),
        (
            {"text_embeds": text(reference_latents=[noise(1, 1, 16, 2, 6, 8)])},
            CONTROL,
            r"must be a tensor \[1, 16, 1, h",
        ),
        ({"text_embeds": text(reference_latents=3)}, CONTROL, "must be a list"),
        ({"negative_embeds": text(reference_latents=[noise(1, 1, 16, 1, 6, 8)])}, CONTROL, "another reference picture"),
    ],
)
def test_what_is_no_reference_is_refused(inputs: dict[str, Any], config: Any, words: str):
    with pytest.raises(ValueError, match=words):
        reference_tensors(asked(**inputs), config)


def test_the_mask_is_where_the_models_row_has_it():
    latents, mask = noise(1, 1, 32, 3, 6, 8), torch.ones(1, 4, 3, 6, 8)
    mask[:, :, 0] = 0
    carried = {"concat_latent_image": latents, "concat_mask": mask}
    found = image_tensors(asked(text_embeds=text(**carried, concat_mask_index=16)), SAMPLING, CONTROL, Status())
    control, picture = (normalise(part, 16) for part in latents[0].split(16))
    expected = torch.cat((control, 1 - mask[0], picture))
    assert torch.equal(found["image_conditioning"], expected)
    # Those of Wan2.1 have none, whatever comes.
    found = image_tensors(asked(text_embeds=text(**carried)), SAMPLING, V10, Status())
    assert torch.equal(found["image_conditioning"], torch.cat((control, picture)))
    with pytest.raises(ValueError, match="concat_mask_index of text_embeds is 0; it must be 16 for Fun-Control"):
        image_tensors(asked(text_embeds=text(**carried)), SAMPLING, CONTROL, Status())
    with pytest.raises(ValueError, match="without concat_mask; both are needed, as Wan22FunControlToVideo adds them"):
        image_tensors(asked(text_embeds=text(concat_latent_image=latents)), SAMPLING, CONTROL, Status())


def test_a_short_control_video_stays_short_and_one_reference_is_all():
    found = own_control(asked(control_video=torch.rand(7, 48, 64, 3)), SAMPLING, CONTROL, Status())
    assert found["control_video"].shape == (3, 5, 48, 64) and set(found) == {"control_video"}
    with pytest.raises(ValueError, match=r"reference_images holds 2 images; this model \(Fun-Control\) takes one"):
        own_control(asked(reference_images=torch.rand(2, 48, 64, 3)), SAMPLING, CONTROL, Status())


def test_a_camera_comes_with_the_conditioning_or_with_the_node():
    rays = noise(1, 1, 24, 3, 48, 64)
    both = {"text_embeds": text(camera_conditions=rays), "negative_embeds": text(camera_conditions=rays.clone())}
    for given in (both, {"text_embeds": text(camera_conditions=rays)}, {"camera_conditions": rays}):
        assert torch.equal(camera_tensors(asked(**given), SAMPLING)["camera_conditions"], rays[0])
    assert camera_tensors(asked(), SAMPLING) == {}
    # As other nodes may hand it on: of another dtype, or a view of something else.
    for given in (rays.half(), rays.double(), rays.transpose(3, 4).contiguous().transpose(3, 4)):
        found = camera_tensors(asked(camera_conditions=given), SAMPLING)["camera_conditions"]
        assert found.dtype == torch.float32 and found.is_contiguous() and torch.equal(found, given[0].float())


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"camera_conditions": 3}, "camera_conditions is int; it must be what WanCameraEmbedding gives"),
        ({"camera_conditions": noise(1, 24, 3, 48, 64)}, r"camera_conditions has shape \[24, 3, 48, 64\]; it must be"),
        ({"camera_conditions": noise(1, 2, 24, 3, 48, 64)}, r"camera_conditions has shape \[2, 24, 3, 48, 64\]"),
        ({"camera_conditions": noise(1, 1, 24, 0, 48, 64)}, r"camera_conditions has shape \[1, 24, 0, 48, 64\]"),
        ({"text_embeds": text(camera_conditions=noise(1, 24))}, "camera_conditions of text_embeds has shape"),
        (
            {"text_embeds": text(camera_conditions=noise(1, 1, 24, 3, 48, 64)), "camera_conditions": noise(2, 1)},
            "camera_conditions come twice",
        ),
        ({"negative_embeds": text(camera_conditions=noise(1, 1, 24, 3, 48, 64))}, "negative_embeds carries other"),
        (
            {
                "text_embeds": text(camera_conditions=noise(1, 1, 24, 3, 48, 64)),
                "negative_embeds": text(camera_conditions=noise(2, 1, 24, 3, 48, 64)),
            },
            "connect both outputs of WanCameraImageToVideo",
        ),
        (
            {"text_embeds": text(camera_conditions=noise(1, 1, 24, 3, 48, 64)), "negative_embeds": text()},
            "connect both",
        ),
    ],
)
def test_what_is_no_camera_is_refused(inputs: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        camera_tensors(asked(**inputs), SAMPLING)


def test_a_5b_models_latents_are_its_own():
    latents, mask = noise(1, 1, 96, 3, 3, 4), torch.ones(1, 4, 3, 3, 4)
    config = replace(TINY, in_dim=148, out_dim=48, parts=frozenset({"ref_conv"}))
    carried = {"concat_latent_image": latents, "concat_mask": mask, "concat_mask_index": 48}
    found = image_tensors(asked(text_embeds=text(**carried)), SAMPLING, config, Status())["image_conditioning"]
    control, picture = (normalise(part, 48) for part in latents[0].split(48))
    assert torch.equal(found, torch.cat((control, 1 - mask[0], picture)))


@pytest.mark.parametrize("negative", [None, {"prompt_embeds": []}], ids=["none", "of another pack"])
def test_a_negative_prompt_that_is_no_conditioning_carries_nothing_else(negative: Any):
    rays, latents = noise(1, 1, 24, 3, 48, 64), noise(2, 1, 16, 1, 6, 8)
    given = asked(text_embeds=text(camera_conditions=rays, reference_latents=[latents]), negative_embeds=negative)
    assert torch.equal(camera_tensors(given, SAMPLING)["camera_conditions"], rays[0])
    assert torch.equal(reference_tensors(given, CONTROL)["reference_latent"], normalise(latents[0], 16)[:, 0])
    lacking = asked(text_embeds=given.text_embeds, negative_embeds=text())
    with pytest.raises(ValueError, match="negative_embeds carries another reference picture"):
        reference_tensors(lacking, CONTROL)
