"""What CLIP sees in the pictures, of every form that other nodes hand on."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from node_inputs import rows
from tiny import TINY
from torch import Tensor
from wan_pack.distributed.job.job import FileIdentity, ModelFiles
from wan_pack.nodes.host.status import Status
from wan_pack.nodes.sockets.clip_vision import clip_tensors, picture_tensors, shown
from wan_pack.nodes.sockets.video_inputs import VideoInputs
from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.vision.clip_picture import fit_clip_picture

I2V = dataclasses.replace(TINY, in_dim=36)
WITH_CLIP = dataclasses.replace(I2V, parts=frozenset({"img_emb"}), clip_dim=64)
START, END = torch.randn(2, 1, 257, 64, generator=torch.Generator().manual_seed(0)).unbind()


def output(states: Any) -> SimpleNamespace:
    """CLIP_VISION_OUTPUT."""
    return SimpleNamespace(penultimate_hidden_states=states, last_hidden_state=None)


def conditioning(**extras: Any) -> list[Any]:
    return [[rows(3)[None], {"pooled_output": None, **extras}]]


def features(status: Status | None = None, config: WanConfig = WITH_CLIP, **inputs: Any) -> Tensor | None:
    found = clip_tensors(VideoInputs.of({"model": None, **inputs}), config, status or Status())
    assert set(found) <= {"clip_features"}
    return found.get("clip_features")


def test_no_features_are_none():
    assert features(text_embeds=conditioning()) is None
    assert features(text_embeds={"prompt_embeds": [rows(3)]}, image_embeds={"clip_context": None}) is None


def test_own_inputs_are_first_then_last():
    assert torch.equal(features(clip_vision_start_image=output(START)), START[0])
    assert torch.equal(features(clip_vision_end_image=output(END)), END[0])
    alone = features(clip_vision_start_image=output(START.bfloat16()))
    assert alone.dtype == torch.float32 and torch.equal(alone, START[0].bfloat16().float())
    both = features(clip_vision_end_image=output(END), clip_vision_start_image=output(START.half()))
    assert both.dtype == torch.float32 and both.shape == (514, 64)
    torch.testing.assert_close(both, torch.cat([START[0].half().float(), END[0]]))


def test_features_that_core_and_the_wrapper_hand_on():
    """WanFirstLastFrameToVideo joins two pictures' to one; WanVideoImageToVideoEncode hands on clip_context."""
    joined = output(torch.cat([START, END], dim=-2))
    both = conditioning(clip_vision_output=joined)
    assert torch.equal(features(text_embeds=both, negative_embeds=both), torch.cat([START[0], END[0]]))
    equal = conditioning(clip_vision_output=output(torch.cat([START, END], dim=-2)))
    assert features(text_embeds=both, negative_embeds=equal).shape == (514, 64)
    assert torch.equal(features(image_embeds={"clip_context": START, "negative_clip_context": START}), START[0])


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"clip_vision_start_image": "fox"}, "clip_vision_start_image is str; it must be a CLIP_VISION_OUTPUT"),
        ({"clip_vision_end_image": output("fox")}, "clip_vision_end_image is str"),
        ({"clip_vision_start_image": output(torch.ones(2, 257, 64))}, r"the shape \[2, 257, 64\]"),
        ({"clip_vision_start_image": output(torch.ones(1, 0, 64))}, r"the shape \[0, 64\]"),
        (
            {"clip_vision_start_image": output(START), "text_embeds": conditioning(clip_vision_output=output(START))},
            "come twice: with clip_vision_start_image and with text_embeds",
        ),
        (
            {"text_embeds": conditioning(clip_vision_output=output(START)),
             "negative_embeds": conditioning(clip_vision_output=output(END))},
            "negative_embeds carries other CLIP vision features than text_embeds",
        ),
        (
            {"text_embeds": conditioning(), "negative_embeds": conditioning(clip_vision_output=output(END))},
            "negative_embeds carries other CLIP vision features",
        ),
        (
            {"image_embeds": {"clip_context": START, "negative_clip_context": END}},
            "other CLIP vision features for the negative prompt",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(inputs: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        features(**inputs)


def test_a_model_without_the_branch_says_that_it_does_not_look():
    """Workflows of Wan2.1 hand them to Wan2.2 too; who connects them here is told."""
    status = Status()
    carried = conditioning(clip_vision_output=output(START))
    assert features(status, I2V, text_embeds=carried, image_embeds={"clip_context": END}) is None
    assert status.notes == ["text_embeds and image_embeds carry CLIP vision features, which I2V models do not use"]
    with pytest.raises(ValueError, match=r"no image branch, as Wan2\.1 I2V, FLF2V, .* has: disconnect it"):
        features(config=I2V, clip_vision_start_image=output(START))


FLF2V = dataclasses.replace(WITH_CLIP, parts=frozenset({"img_emb", "emb_pos"}))
CONTROL = dataclasses.replace(TINY, in_dim=48, parts=frozenset({"img_emb", "ref_conv"}), clip_dim=64)
FILE = FileIdentity(path="/models/a.safetensors", size=1, mtime_ns=1)
PICTURES = dict(zip(("start_image", "end_image", "reference_images"), torch.rand(3, 1, 48, 64, 3), strict=True))


def looked_at(config: WanConfig, *names: str, clip: bool = True, **more: Any) -> list[str]:
    model = ModelFiles(high_noise=(FILE,), low_noise=(), vae=(FILE,), clip_vision=(FILE,) if clip else ())
    asked = VideoInputs.of({"model": None, **{name: PICTURES[name] for name in names}, **more})
    status, pictures = Status(), shown(asked, model, config)
    made = picture_tensors(pictures, status)
    assert (made != {}) is (pictures != {})
    if made:
        expected = [fit_clip_picture(PICTURES[name][0]) for name in pictures]
        assert torch.equal(made["clip_pictures"], torch.stack(expected)) and made.keys() == {"clip_pictures"}
        assert status.notes == [f"CLIP looks at {' and '.join(pictures)}, inside the job"]
    return list(pictures)


def test_an_alpha_channel_is_not_shown():
    picture = torch.rand(2, 48, 64, 4)
    made = picture_tensors({"start_image": picture}, Status())["clip_pictures"]
    assert torch.equal(made, fit_clip_picture(picture[0, :, :, :3])[None])


def test_the_jobs_own_clip_is_shown_as_many_pictures_as_the_model_has_places_for():
    assert looked_at(WITH_CLIP, "start_image") == ["start_image"]
    assert looked_at(WITH_CLIP, "start_image", "end_image") == ["start_image"]
    assert looked_at(WITH_CLIP, "end_image") == ["end_image"]
    assert looked_at(FLF2V, "start_image", "end_image") == ["start_image", "end_image"]
    assert looked_at(FLF2V, "end_image") == ["end_image"]
    assert looked_at(CONTROL, "start_image", "reference_images") == ["reference_images"]
    assert looked_at(CONTROL, "start_image") == ["start_image"]


def test_nothing_is_shown_to_a_model_without_a_branch_or_without_clip():
    assert looked_at(I2V, "start_image") == looked_at(WITH_CLIP, "start_image", clip=False) == looked_at(FLF2V) == []


def test_a_control_video_alone_has_the_features_of_no_picture():
    """As in the code of the model's makers (VideoX-Fun), who set them to zero."""
    video, status = {"control_video": torch.rand(5, 48, 64, 3)}, Status()
    assert torch.equal(features(status, CONTROL, **video), torch.zeros(257, 64))
    assert status.notes == ["there is no picture for CLIP beside the control video: its features are zeros"]
    for name, picture in PICTURES.items():
        assert features(config=CONTROL, **video, **{name: picture}) is None, name
    without = dataclasses.replace(TINY, in_dim=52, parts=frozenset({"ref_conv"}))
    assert features(config=without, **video) is None and features(config=CONTROL) is None
    given = features(config=CONTROL, **video, clip_vision_start_image=output(START))
    assert torch.equal(given, START[0])
