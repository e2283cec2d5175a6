"""Latent frames that ComfyUI-WanVideoWrapper's embeds hold from the start, and what else its embeds are refused for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from node_inputs import sampling
from tiny import TINY
from torch import Tensor
from wan_pack.nodes.host.status import Status
from wan_pack.nodes.sockets.images import image_tensors
from wan_pack.nodes.sockets.video_inputs import VideoInputs
from wan_pack.wan.vae.latents import denormalise

TI2V = replace(TINY, in_dim=48, out_dim=48)
SIZE = (3, 3, 4)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tensors(config: Any = TI2V, **embeds: Any) -> dict[str, Tensor]:
    """Of a video of 9 frames, three latent ones."""
    held = {"target_shape": (16, 3, 6, 8), "num_frames": 9, **embeds}
    return image_tensors(
        VideoInputs.of({"model": None, "image_embeds": held}), sampling(num_frames=9), config, Status()
    )


@pytest.mark.parametrize(
    ("count", "index", "first"),
    [
        (1, 0, 0), (1, 1, 1), (1, 2, 2), (1, -1, 2), (1, -3, 0), (1, -4, 0), (1, 3, 2), (1, 99, 2), (1, -99, 0),
        (2, 0, 0), (2, 1, 1), (2, 2, 1), (2, -1, 1), (2, -2, 1), (2, -3, 0), (3, 0, 0), (3, 2, 0), (3, -1, 0),
    ],
)  # fmt: skip
def test_frames_stand_where_they_are_asked_for_as_far_as_all_are_inside(count: int, index: int, first: int):
    given = noise(1, 1, 48, count, 3, 4)
    found = tensors(extra_latents=[{"samples": given, "index": index}])
    known = range(first, first + count)
    assert [bool(frame.eq(0).all()) for frame in found["noise_mask"]] == [frame in known for frame in range(3)]
    assert [bool(frame.eq(1).all()) for frame in found["noise_mask"]] == [frame not in known for frame in range(3)]
    torch.testing.assert_close(found["samples"][:, first : first + count], denormalise(given[0], 48))
    empty = denormalise(torch.zeros(48, *SIZE), 48)
    assert all(torch.equal(found["samples"][:, i], empty[:, i]) for i in range(3) if i not in known)


def test_several_entries_each_have_their_place():
    one, other = noise(1, 1, 48, 1, 3, 4), noise(2, 1, 48, 1, 3, 4).half()
    entries = [{"samples": one, "index": 0}, {"samples": other, "index": -1}]
    found = tensors(extra_latents=entries)
    assert found["noise_mask"][:, 0, 0].tolist() == [0, 1, 0] and found["samples"].dtype == torch.float32
    torch.testing.assert_close(found["samples"][:, [0, 2]], denormalise(torch.cat([one[0], other[0]], 1), 48))
    assert tensors(extra_latents=[]) == tensors(extra_latents=None) == {}


ENTRY = {"samples": noise(1, 1, 48, 1, 3, 4), "index": 0}


@pytest.mark.parametrize(
    ("embeds", "words"),
    [
        ({"extra_latents": "fox"}, "extra_latents of image_embeds are str; they must be a list of at most 3, the"),
        ({"extra_latents": [ENTRY] * 4}, "extra_latents of image_embeds are 4 entries; they must be a list of at"),
        ({"extra_latents": [3]}, "an entry of extra_latents of image_embeds is int; it must be an object with samples"),
        ({"extra_latents": [{**ENTRY, "index": True}]}, "index of an entry .* is True; it must be a whole number"),
        ({"extra_latents": [{**ENTRY, "index": "0"}]}, "index of an entry .* is '0'; it must be a whole number"),
        ({"extra_latents": [{**ENTRY, "samples": None}]}, "samples of an entry .* is NoneType; it must be a tensor"),
        *(
            ({"extra_latents": [{**ENTRY, "samples": noise(1, *shape)}]},
             r"have the shape .*; it must be \[1, 48, at most 3, 3, 4\]")
            for shape in ((1, 48, 4, 3, 4), (1, 48, 0, 3, 4), (2, 48, 1, 3, 4), (1, 48, 1, 4, 3), (48, 1, 3, 4))
        ),
        ({"target_shape": "fox"}, "target_shape of image_embeds is 'fox'; it must be four sizes, C, T, h and w"),
        ({"target_shape": (16, 3, 6)}, "target_shape of image_embeds is .* four sizes"),
        ({"target_shape": (16, 3.0, 6, 8)}, "target_shape of image_embeds is .* four sizes"),
        ({"target_shape": (16, 3, 8, 6)}, "image_embeds is for 48x64, 9 frames; this node makes 64x48, 9 frames"),
        ({"image_embeds": noise(1, 16, 3, 6, 8), "mask": noise(1, 4, 6, 8)}, r"must be \[C, T, h, w\] of one size"),
        ({"image_embeds": noise(1, 16, 6, 8), "mask": noise(1, 4, 6, 8)}, r"must be \[C, T, h, w\] of one size"),
        ({"image_embeds": noise(1, 17, 3, 6, 8), "mask": noise(1, 4, 3, 6, 8)}, "have 21 channels; they must have 20"),
        ({"vace_scale": 0.5}, "image_embeds carries vace_scale, which this node does not support"),
        ({"vace_context": [], "has_ref": True}, "image_embeds carries has_ref, vace_context, which this node does not"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(embeds: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        tensors(**embeds)


def test_a_vace_controls_own_keys_are_read_elsewhere():
    """By the reader of controls; has_ref alone is another model's."""
    keys = ("vace_scale", "vace_start_percent", "vace_end_percent", "vace_seq_len", "has_ref", "additional_vace_inputs")
    assert tensors(vace_context=[noise(1, 96, 3, 6, 8)], **dict.fromkeys(keys, 1)) == {}
