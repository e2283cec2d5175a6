"""Images of every form that other nodes hand on: IMAGE, core CONDITIONING, ComfyUI-WanVideoWrapper's embeds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from node_inputs import rows, sampling
from tiny import TINY
from torch import Tensor
from wan_pack.nodes.host.status import Status
from wan_pack.nodes.sockets import embeds
from wan_pack.nodes.sockets.images import image_tensors
from wan_pack.nodes.sockets.video_inputs import VideoInputs
from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.vae.latents import denormalise, normalise

I2V = dataclasses.replace(TINY, in_dim=36)
TI2V = dataclasses.replace(TINY, in_dim=48, out_dim=48)
SIZE, SIZE_5B = (2, 6, 8), (2, 3, 4)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tensors_of(status: Status | None = None, config: WanConfig = I2V, **inputs: Any) -> dict[str, Tensor]:
    return image_tensors(VideoInputs.of({"model": None, **inputs}), sampling(), config, status or Status())


# IMAGE


@pytest.mark.parametrize("name", ["start_image", "end_image"])
def test_image_becomes_a_frame_of_the_video(name: str) -> None:
    status = Status()
    image = torch.rand(1, 48, 64, 3, generator=torch.Generator().manual_seed(0))
    found = tensors_of(status, **{name: image})
    assert list(found) == [name]
    torch.testing.assert_close(found[name], image[0].permute(2, 0, 1) * 2 - 1)
    assert status.warnings == []


def test_what_was_done_to_an_image_is_said() -> None:
    status = Status()
    found = tensors_of(status, start_image=torch.rand(3, 100, 100, 4))
    assert found["start_image"].shape == (3, 48, 64)
    assert status.warnings == [
        "start_image holds 3 images; the first one is used",
        "start_image has an alpha channel, which is not used",
        "start_image is 100x100; it was scaled to cover 64x48 and cut to it",
    ]
    status = Status()
    tensors_of(status, start_image=torch.rand(1, 96, 128, 3))
    assert (status.notes, status.warnings) == (["start_image is 128x96; it was scaled to 64x48"], [])


@pytest.mark.parametrize(
    ("image", "found"), [(torch.rand(48, 64, 3), r"\[48, 64, 3\]"), (torch.rand(1, 48, 64, 1), r"1\]"), ("fox", "str")]
)
def test_what_is_no_image_is_refused(image: Any, found: str) -> None:
    with pytest.raises(ValueError, match=rf"start_image is .*{found}; it must be an IMAGE"):
        tensors_of(start_image=image)


# Core CONDITIONING


def conditioning(**extras: Any) -> list[Any]:
    return [[rows(3)[None], {"pooled_output": None, **extras}]]


def wan_image_to_video(latents: Tensor, mask: Tensor) -> dict[str, Any]:
    """Both prompts, as WanImageToVideo leaves them: the same tensors in both."""
    extras = {"concat_latent_image": latents, "concat_mask": mask}
    return {"text_embeds": conditioning(**extras), "negative_embeds": conditioning(**extras)}


@pytest.mark.parametrize("channels", [1, 4], ids=["WanImageToVideo", "WanFirstLastFrameToVideo"])
def test_cores_image_is_normalised_and_its_mask_inverted(channels: int) -> None:
    raw, mask = noise(1, 16, *SIZE), torch.ones(1, channels, *SIZE)
    mask[:, :, :1] = 0
    found = tensors_of(**wan_image_to_video(raw, mask))
    assert list(found) == ["image_conditioning"]
    made = found["image_conditioning"]
    assert made.shape == (20, *SIZE) and made.dtype == torch.float32 and made.is_contiguous()
    assert made[:4, 0].eq(1).all() and made[:4, 1:].eq(0).all()
    torch.testing.assert_close(made[4:], normalise(raw[0], 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8, torch.float16])
def test_mask_channels_stay_apart(dtype: torch.dtype) -> None:
    mask = torch.ones(1, 4, *SIZE)
    mask[:, 3, 1] = 0
    made = tensors_of(**wan_image_to_video(noise(1, 16, *SIZE), mask.to(dtype)))["image_conditioning"]
    assert made.dtype == torch.float32 and made[:3, 1].eq(0).all() and made[3, 1].eq(1).all()


def test_conditioning_without_an_image_holds_none() -> None:
    assert tensors_of(text_embeds=conditioning(), negative_embeds=conditioning()) == {}
    assert tensors_of(text_embeds={"prompt_embeds": [rows(3)]}) == {}


def test_a_negative_prompt_of_another_node_is_taken() -> None:
    both = wan_image_to_video(noise(1, 16, *SIZE), torch.ones(1, 1, *SIZE))
    assert list(tensors_of(**{**both, "negative_embeds": conditioning()})) == ["image_conditioning"]
    with pytest.raises(ValueError, match="negative_embeds carries an image and text_embeds does not"):
        tensors_of(**{**both, "text_embeds": conditioning()})
    status = Status()
    other = wan_image_to_video(noise(1, 16, *SIZE) + 1, torch.ones(1, 1, *SIZE))
    tensors_of(status, **{**both, "negative_embeds": other["negative_embeds"]})
    assert status.warnings == ["negative_embeds carries another image than text_embeds; that of text_embeds is used"]


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"concat_latent_image": noise(1, 16, *SIZE)}, "carries concat_latent_image without concat_mask"),
        ({"concat_mask": torch.ones(1, 1, *SIZE)}, "carries concat_mask without concat_latent_image"),
        (
            {"concat_latent_image": noise(1, 16, 3, 6, 8), "concat_mask": torch.ones(1, 1, 3, 6, 8)},
            "concat_latent_image of text_embeds is for 64x48, 9 frames; this node makes 64x48, 5 frames",
        ),
        (
            {"concat_latent_image": noise(1, 32, *SIZE), "concat_mask": torch.ones(1, 1, *SIZE)},
            r"shape \[1, 32, 2, 6, 8\]; Wan I2V takes \[1, 16, T, h, w\]",
        ),
        (
            {"concat_latent_image": noise(1, 16, *SIZE), "concat_mask": torch.ones(1, 2, *SIZE)},
            r"concat_mask of text_embeds has shape \[1, 2, 2, 6, 8\]",
        ),
    ],
)
def test_conditioning_that_does_not_fit_is_refused(extras: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tensors_of(text_embeds=conditioning(**extras))


@pytest.mark.parametrize(
    "extras",
    [
        {"control": object()},
        {"audio_embed": noise(1)},
        {"time_dim_concat": noise(1)},
        {"hooks": object()},
        {"mask": noise(1)},
        {"start_percent": 0.5},
    ],
    ids=lambda extras: next(iter(extras)),
)
def test_conditioning_of_other_models_is_refused_by_name(extras: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"text_embeds carries {', '.join(sorted(extras))}, which this node does not"):
        embeds.prompt_of(conditioning(**extras), "text_embeds")


# WANVIDIMAGE_EMBEDS


def i2v_embeds(**values: Any) -> dict[str, Any]:
    """As WanVideoImageToVideoEncode makes them."""
    mask = torch.zeros(4, *SIZE)
    mask[:, 0] = 1
    return {
        "image_embeds": noise(16, *SIZE),
        "mask": mask,
        "clip_context": None,
        "negative_clip_context": None,
        "max_seq_len": 24,
        "num_frames": 5,
        "lat_h": 6,
        "lat_w": 8,
        "control_embeds": None,
        "end_image": None,
        "fun_or_fl2v_model": False,
        "has_ref": False,
        "add_cond_latents": None,
        **values,
    }


def test_the_wrappers_image_is_taken_as_it_is() -> None:
    given = i2v_embeds()
    status = Status()
    found = tensors_of(status, image_embeds=given)
    assert list(found) == ["image_conditioning"]
    assert torch.equal(found["image_conditioning"], torch.cat([given["mask"], given["image_embeds"]]))
    assert status.warnings == []


def test_the_old_form_holds_mask_and_latents_in_one() -> None:
    given = i2v_embeds()
    together = torch.cat([given["mask"], given["image_embeds"]]).bfloat16()
    old = {"image_embeds": together, "clip_context": noise(1, 257, 1280), "max_seq_len": 24, "num_frames": 5}
    found = tensors_of(image_embeds={**old, "lat_h": 6, "lat_w": 8})
    assert torch.equal(found["image_conditioning"], together.float())


def test_embeds_with_five_keys_only() -> None:
    given = i2v_embeds()
    short = {key: given[key] for key in ("image_embeds", "num_frames", "lat_h", "lat_w", "mask")}
    assert tensors_of(image_embeds=short)["image_conditioning"].shape == (20, *SIZE)


def test_an_end_image_inside_the_video_is_taken() -> None:
    given = i2v_embeds(end_image=noise(3, 48, 64), fun_or_fl2v_model=True)
    assert tensors_of(image_embeds=given)["image_conditioning"].shape == (20, *SIZE)


def empty_embeds(**values: Any) -> dict[str, Any]:
    """As WanVideoEmptyEmbeds makes them: 16 channels and 8 pixels per latent for every model."""
    return {"target_shape": (16, *SIZE), "num_frames": 5, "control_embeds": None, **values}


@pytest.mark.parametrize("config", [TINY, TI2V], ids=["A14B", "5B"])
def test_empty_embeds_hold_a_size_only(config: WanConfig) -> None:
    assert tensors_of(config=config, image_embeds=empty_embeds()) == {}
    with pytest.raises(ValueError, match="image_embeds is for 64x48, 13 frames; this node makes 64x48, 5 frames"):
        tensors_of(config=config, image_embeds=empty_embeds(target_shape=(16, 4, 6, 8)))


@pytest.mark.parametrize(("index", "frame"), [(0, 0), (-1, 1), (7, 1)])
def test_known_frames_of_the_5b_model_become_latents_and_a_mask(index: int, frame: int) -> None:
    given = noise(1, 48, 1, *SIZE_5B[1:])
    extra = [{"samples": given, "index": index}]
    found = tensors_of(config=TI2V, image_embeds=empty_embeds(extra_latents=extra))
    assert found["samples"].shape == (48, *SIZE_5B)
    assert found["noise_mask"].shape == SIZE_5B
    assert found["noise_mask"][frame].eq(0).all() and found["noise_mask"][1 - frame].eq(1).all()
    torch.testing.assert_close(found["samples"][:, frame], denormalise(given[0], 48)[:, 0])


@pytest.mark.parametrize(
    "extras",
    [
        {"audio_embeds": {}},
        {"pose_latents": noise(1), "vae": object()},
        {"has_ref": True},
        {"add_cond_latents": {}},
    ],
    ids=lambda extras: next(iter(extras)),
)
def test_embeds_of_other_models_are_refused_by_name(extras: dict[str, Any]) -> None:
    for given in (i2v_embeds(**extras), empty_embeds(**extras)):
        with pytest.raises(ValueError, match=f"image_embeds carries {', '.join(sorted(extras))}, which this node does"):
            tensors_of(image_embeds=given)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (noise(3), "image_embeds is Tensor of shape .*; it must be WANVIDIMAGE_EMBEDS"),
        ({"num_frames": 5}, "holds neither image_embeds nor target_shape"),
        (i2v_embeds(image_embeds=noise(16, 3, 6, 8), mask=noise(4, 3, 6, 8)), "is for 64x48, 9 frames"),
        (i2v_embeds(mask=noise(4, 3, 6, 8)), r"shapes \[\(4, 3, 6, 8\), \(16, 2, 6, 8\)\]"),
        (i2v_embeds(mask=None), "have 16 channels; they must have 20"),
        (i2v_embeds(end_image=noise(3, 48, 64)), "turn on fun_or_fl2v_model"),
        (
            empty_embeds(extra_latents=[{"samples": noise(1, 16, 1, 6, 8), "index": 0}]),
            "extra_latents, which only TI2V-5B, Fun-InP 5B, ",
        ),
    ],
)
def test_embeds_that_do_not_fit_are_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tensors_of(image_embeds=value)


@pytest.mark.parametrize("shape", [(1, 16, 1, 6, 8), (1, 48, 3, 3, 4), (48, 1, 3, 4)])
def test_known_frames_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    extra = [{"samples": noise(*shape), "index": 0}]
    with pytest.raises(
        ValueError, match=r"extra_latents of image_embeds have the shape .* it must be \[1, 48, at most 2"
    ):
        tensors_of(config=TI2V, image_embeds=empty_embeds(extra_latents=extra))


def test_an_image_that_comes_twice_is_refused() -> None:
    both = wan_image_to_video(noise(1, 16, *SIZE), torch.ones(1, 1, *SIZE))
    with pytest.raises(ValueError, match="an image comes twice: with image_embeds and with text_embeds"):
        tensors_of(**both, image_embeds=i2v_embeds())
