"""What a VACE model follows: pixels, core's conditioning and ComfyUI-WanVideoWrapper's embeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from node_inputs import rows, sampling
from tiny import TINY, TINY_VACE
from torch import Tensor
from wan_pack.nodes.host.status import Status
from wan_pack.nodes.sockets.vace_inputs import carried_control, check_length, control_size, own_control
from wan_pack.nodes.sockets.video_inputs import VideoInputs
from wan_pack.wan.vae.latents import normalise

SIZE = (2, 6, 8)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def asked(**inputs: Any) -> VideoInputs:
    return VideoInputs.of({"model": None, **inputs})


def core(*strengths: float, references: int = 0, seed: int = 0) -> dict[str, Any]:
    """What a chain of WanVaceToVideo adds to a CONDITIONING."""
    size = (SIZE[0] + references, *SIZE[1:])
    return {
        "vace_frames": [noise(1, 32, *size, seed=seed + i) for i in range(len(strengths))],
        "vace_mask": [noise(1, 64, *size, seed=9 + i) for i in range(len(strengths))],
        "vace_strength": list(strengths),
    }


def both(extras: dict[str, Any]) -> dict[str, Any]:
    conditioning = [[rows(3)[None], {"pooled_output": None, **extras}]]
    return {"text_embeds": conditioning, "negative_embeds": conditioning}


def wrapper(**values: Any) -> dict[str, Any]:
    """As WanVideoVACEEncode makes them."""
    return {
        "vace_context": [noise(96, *SIZE)], "vace_scale": 0.7, "has_ref": False, "num_frames": 5,
        "target_shape": (16, *SIZE), "vace_start_percent": 0.0, "vace_end_percent": 1.0, "vace_seq_len": 24,
        "additional_vace_inputs": [], **values,
    }  # fmt: skip


def test_core_chain_is_normalised_and_keeps_its_strengths():
    extras = core(1.0, 0.5, references=1)
    found = carried_control(asked(**both(extras)))
    assert found["vace_context"].shape == (2, 96, 3, 6, 8)
    assert found["vace_strength"].tolist() == [1.0, 0.5]
    for one, frames, mask in zip(found["vace_context"], extras["vace_frames"], extras["vace_mask"], strict=True):
        torch.testing.assert_close(one[:16], normalise(frames[0, :16], 16))
        torch.testing.assert_close(one[16:32], normalise(frames[0, 16:], 16))
        assert torch.equal(one[32:], mask[0])
    assert control_size(asked(), found, sampling(), TINY_VACE) == (2, 1)


def test_reference_zeros_of_core_are_zero_again():
    """WanVaceToVideo stores them un-normalised."""
    from wan_pack.wan.vae.latents import denormalise

    extras = core(1.0)
    extras["vace_frames"][0][:, 16:] = denormalise(torch.zeros(1, 16, *SIZE), 16)
    assert carried_control(asked(**both(extras)))["vace_context"][0, 16:32].abs().max() < 1e-6


def test_wrapper_embeds_are_taken_as_they_are_with_those_before_them():
    first, second = wrapper(), wrapper(vace_context=[noise(96, *SIZE, seed=4)], vace_scale=[0.3] * 5)
    found = carried_control(asked(image_embeds={**second, "additional_vace_inputs": [first]}))
    assert torch.equal(found["vace_context"], torch.stack([second["vace_context"][0], first["vace_context"][0]]))
    torch.testing.assert_close(found["vace_strength"], torch.tensor([0.3, 0.7]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_controls_travel_in_float32_whatever_they_come_in(dtype: torch.dtype):
    embeds = wrapper(vace_context=[noise(96, *SIZE).to(dtype)])
    assert carried_control(asked(image_embeds=embeds))["vace_context"].dtype == torch.float32
    extras = core(1.0)
    extras["vace_frames"] = [frames.to(dtype) for frames in extras["vace_frames"]]
    assert carried_control(asked(**both(extras)))["vace_context"].dtype == torch.float32


def test_without_a_control_there_is_none():
    assert carried_control(asked(text_embeds=[[rows(3)[None], {}]], image_embeds={"target_shape": (16, *SIZE)})) == {}
    assert own_control(asked(), sampling(), TINY, Status()) == {}
    assert control_size(asked(), {}, sampling(), TINY) == (0, 0)
    assert control_size(asked(), {}, sampling(), TINY_VACE) == (1, 0)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (both({**core(1.0), "vace_mask": None}), "vace_mask of text_embeds is NoneType; it must be a list"),
        (both({**core(1.0), "vace_strength": [1.0, 1.0]}), "lists of different lengths"),
        (both({**core(1.0), "vace_strength": ["x"]}), "vace_strength of text_embeds is 'x'"),
        (both({**core(1.0), "vace_frames": [noise(1, 16, *SIZE)]}), r"\[1, 16, 2, 6, 8\]; it must be \[1, 32"),
        (both({**core(1.0), "vace_mask": [noise(1, 64, 1, 6, 8)]}),
         r"vace_frames and vace_mask of text_embeds are of \[2, 6, 8\] and \[1, 6, 8\]; they must be of one size"),
        (both({**core(1.0), "vace_frames": ["x"]}), "vace_frames of text_embeds is str"),
        (
            {**both(core(1.0)), "negative_embeds": both(core(0.5))["negative_embeds"]},
            "negative_embeds carries another VACE control",
        ),
        (
            {**both(core(1.0)), "negative_embeds": both({})["negative_embeds"]},
            "negative_embeds carries another VACE control",
        ),
        ({**both(core(1.0)), "image_embeds": wrapper()}, "comes twice: with image_embeds and with text_embeds"),
        ({**both(core(1.0)), "control_video": torch.ones(5, 48, 64, 3)}, "comes twice: with control_video and"),
        ({"image_embeds": wrapper(vace_start_percent=0.2)}, r"vace_start_percent of image_embeds"),
        ({"image_embeds": wrapper(vace_scale=[0.2, 0.3])}, "vace_scale of image_embeds is"),
        ({"image_embeds": wrapper(vace_context=[noise(1)])}, r"it must be \[96, T, h, w\]"),
        ({"image_embeds": wrapper(vace_context=[noise(96, 0, 6, 8)])}, r"\[96, 0, 6, 8\]; it must be \[96, T, h, w\]"),
        ({"image_embeds": wrapper(vace_context="x")}, "vace_context of image_embeds is str"),
        ({"image_embeds": wrapper(additional_vace_inputs=["x"])}, "additional_vace_inputs of image_embeds is list"),
        (
            {"image_embeds": wrapper(additional_vace_inputs=[wrapper(vace_context=[noise(96, 3, 6, 8)])])},
            "must have one size, and as many reference images each",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(inputs: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        carried_control(asked(**inputs))


def test_pixels_of_the_nodes_own():
    status = Status()
    video, pictures = noise(7, 48, 64, 3).sigmoid(), noise(2, 96, 128, 4).sigmoid()
    mask = torch.zeros(3, 24, 32)
    mask[:, :, :16] = 1
    inputs = asked(control_video=video, control_mask=mask, reference_images=pictures, vace_strength=0.5)
    found = own_control(inputs, sampling(), TINY_VACE, status)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "control_video": (3, 5, 48, 64), "control_mask": (5, 48, 64), "reference_images": (2, 3, 48, 64),
        "vace_strength": (1,),
    }  # fmt: skip
    torch.testing.assert_close(found["control_video"][:, 4], video[4].permute(2, 0, 1) * 2 - 1)
    # A mask is stretched with its video, and ends where everything is made anew.
    assert found["control_mask"][0, :, :31].eq(1).all() and found["control_mask"][0, :, 33:].eq(0).all()
    assert found["control_mask"][3:].eq(1).all()
    assert found["vace_strength"].tolist() == [0.5]
    assert status.notes == [
        "control_video has 7 frames; the first 5 are used", "control_mask has 3 frames; those behind are made anew"
    ]  # fmt: skip
    assert control_size(inputs, {}, sampling(), TINY_VACE) == (1, 2)


def test_a_short_control_video_ends_in_grey_that_is_made_anew():
    status = Status()
    found = own_control(asked(control_video=torch.ones(2, 48, 64, 3)), sampling(), TINY_VACE, status)
    assert found["control_video"][:, :2].eq(1).all() and found["control_video"][:, 2:].eq(0).all()
    assert "control_mask" not in found
    assert status.notes == ["control_video has 2 frames; those behind are made without one"]


def test_one_mask_is_that_of_every_frame_that_there_is():
    status = Status()
    inputs = asked(control_video=torch.ones(2, 48, 64, 3), control_mask=torch.zeros(1, 48, 64))
    mask = own_control(inputs, sampling(), TINY_VACE, status)["control_mask"]
    assert mask[:2].eq(0).all() and mask[2:].eq(1).all()
    assert status.notes == ["control_video has 2 frames; those behind are made without one"]
    # A mask of whole numbers is stretched as one of fractions.
    halves = torch.zeros(1, 24, 32)
    halves[..., 16:] = 1
    masks = [
        own_control(asked(control_video=torch.ones(2, 48, 64, 3), control_mask=it), sampling(), TINY_VACE, Status())
        for it in (halves, halves.bool(), halves.half())
    ]
    assert all(torch.equal(one["control_mask"], masks[0]["control_mask"]) for one in masks)


def test_a_control_of_a_longer_video_is_not_taken_for_references():
    """5 frames are two latent ones; four are those of 13, or of two references and 5."""
    longer = noise(2, 96, 4, 6, 8)
    with pytest.raises(ValueError, match=r"is of 13 frames, and num_frames is 5; make them equal"):
        check_length({"vace_context": longer}, sampling(), TINY_VACE)
    one = longer.clone()
    one[:, 16:, 0] = 1e-7
    with pytest.raises(ValueError, match="is of 9 frames, and num_frames is 5"):
        check_length({"vace_context": one}, sampling(), TINY_VACE)
    one[:, 16:, 1] = 0
    check_length({"vace_context": one}, sampling(), TINY_VACE)
    check_length({"vace_context": longer[:, :, :2]}, sampling(), TINY_VACE)
    check_length({}, sampling(), TINY_VACE)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"control_mask": torch.ones(5, 48, 64)}, "control_mask is connected but control_video is not"),
        ({"control_video": "x"}, r"control_video is str; it must be an IMAGE \[F, H, W, 3\]"),
        ({"control_video": torch.ones(5, 48, 64, 1)}, r"control_video is \[5, 48, 64, 1\]"),
        ({"control_video": torch.ones(5, 48, 64, 3), "control_mask": torch.ones(5, 48, 64, 1)}, "must be a MASK"),
        ({"reference_images": torch.ones(0, 48, 64, 3)}, r"reference_images is \[0, 48, 64, 3\]"),
    ],
)
def test_what_is_no_video_mask_or_picture_is_refused(inputs: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        own_control(asked(**inputs), sampling(), TINY_VACE, Status())


def test_what_is_transparent_in_own_pictures_does_not_count():
    pictures = {"control_video": torch.rand(5, 48, 64, 4), "reference_images": torch.rand(2, 48, 64, 4)}
    plain = {name: picture[..., :3] for name, picture in pictures.items()}
    one, other = (own_control(asked(**given), sampling(), TINY_VACE, Status()) for given in (pictures, plain))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_mask_of_whole_numbers_will_do_where_latents_of_them_will_not():
    extras = core(1.0)
    whole = [mask.round().to(torch.int64) for mask in extras["vace_mask"]]
    found = carried_control(asked(**both({**extras, "vace_mask": whole})))["vace_context"]
    assert found.dtype == torch.float32 and torch.equal(found[0, 32:], whole[0][0].float())
    frames = [part.round().to(torch.int64) for part in extras["vace_frames"]]
    with pytest.raises(ValueError, match=r"vace_frames of text_embeds holds whole numbers \(torch\.int64\)"):
        carried_control(asked(**both({**extras, "vace_frames": frames})))
