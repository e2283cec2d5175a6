"""LATENT of every form that other nodes hand on."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from node_inputs import sampling
from tiny import TINY
from wan_pack.nodes.host.status import Status
from wan_pack.nodes.sockets.latent_input import latent_tensors
from wan_pack.wan.vae.latents import normalise

TI2V = dataclasses.replace(TINY, in_dim=48, out_dim=48)
SHAPE, SHAPE_5B = (16, 2, 6, 8), (48, 2, 3, 4)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tensors_of(value: Any, config: Any = TINY, status: Status | None = None) -> dict[str, torch.Tensor]:
    return latent_tensors(value, sampling(), config, status or Status())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_core_latent_goes_through_as_it_is(dtype: torch.dtype) -> None:
    status = Status()
    given = noise(1, *SHAPE).to(dtype)
    found = tensors_of({"samples": given}, status=status)
    assert list(found) == ["samples"]
    assert found["samples"].dtype == torch.float32
    assert torch.equal(found["samples"], given[0].float())
    assert status.warnings == []


@pytest.mark.parametrize(
    "extra",
    [
        {"looped": False, "end_image": None, "has_ref": False, "drop_last": False, "generator_state": None},
        {"original_image": None, "cache_states": None},
        {"noise_mask": None},
    ],
    ids=["sampler", "newer sampler", "encoder"],
)
def test_the_wrappers_latent_is_scaled_to_comfyuis(extra: dict[str, Any]) -> None:
    status = Status()
    raw = noise(1, *SHAPE)
    found = tensors_of({"samples": normalise(raw, 16), **extra}, status=status)
    torch.testing.assert_close(found["samples"], raw[0], rtol=1e-5, atol=1e-5)
    assert status.notes == ["samples are ComfyUI-WanVideoWrapper's: they were scaled to ComfyUI's latents"]


def test_empty_latent_is_none_but_its_size_counts() -> None:
    assert tensors_of({"samples": torch.zeros(1, *SHAPE)}) == {}
    # EmptyHunyuanLatentVideo makes 16 channels, whatever the model.
    assert tensors_of({"samples": torch.zeros(1, *SHAPE)}, TI2V) == {}
    with pytest.raises(ValueError, match="samples is for 32x48, 5 frames; this node makes 64x48, 5 frames"):
        tensors_of({"samples": torch.zeros(1, 16, 2, 6, 4)})


def test_first_frame_of_the_5b_model_keeps_its_mask() -> None:
    # As Wan22ImageToVideoLatent: 0 where the frame is known.
    mask = torch.ones(1, 1, *SHAPE_5B[1:])
    mask[:, :, :1] = 0
    found = tensors_of({"samples": noise(1, *SHAPE_5B), "noise_mask": mask}, TI2V)
    assert found["samples"].shape == SHAPE_5B
    assert found["noise_mask"].shape == SHAPE_5B[1:]
    assert found["noise_mask"][0].eq(0).all() and found["noise_mask"][1].eq(1).all()


def test_a_mask_of_ones_is_no_mask() -> None:
    assert list(tensors_of({"samples": noise(1, *SHAPE), "noise_mask": torch.ones(1, 1, 48, 64)})) == ["samples"]


def test_a_mask_makes_zeros_count() -> None:
    mask = torch.zeros(1, 1, *SHAPE_5B[1:])
    assert list(tensors_of({"samples": torch.zeros(1, *SHAPE_5B), "noise_mask": mask}, TI2V)) == [
        "samples",
        "noise_mask",
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (noise(1, *SHAPE), "samples is Tensor of shape .*; it must be a video's LATENT"),
        ({}, "samples is dict; it must be a video's LATENT"),
        ({"samples": noise(1, 16, 6, 8)}, r"samples is of shape \[1, 16, 6, 8\]"),
        ({"samples": noise(2, *SHAPE)}, "samples hold 2 videos; this node makes one. Set batch_size to 1"),
        ({"samples": noise(1, 4, 2, 6, 8)}, "samples have 4 channels; Wan's latents have 16 or 48"),
        ({"samples": noise(1, *SHAPE_5B)}, "samples have 48 channels; this model's latents have 16"),
        ({"samples": noise(1, 16, 3, 6, 8)}, "samples is for 64x48, 9 frames; this node makes 64x48, 5 frames"),
        ({"samples": noise(1, *SHAPE), "has_ref": True}, r"reference frame \(has_ref\)"),
        (
            {"samples": noise(1, *SHAPE), "noise_mask": torch.zeros(1, 1, 48, 64)},
            r"noise_mask of shape \[1, 1, 48, 64\]; it must be \[1, 1, 2, 6, 8\]",
        ),
    ],
)
def test_what_is_no_latent_of_this_video_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tensors_of(value)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.float64])
def test_a_mask_may_be_of_any_dtype(dtype: torch.dtype) -> None:
    mask = torch.ones(1, 1, *SHAPE_5B[1:])
    mask[:, :, :1] = 0
    found = tensors_of({"samples": noise(1, *SHAPE_5B), "noise_mask": mask.to(dtype)}, TI2V)["noise_mask"]
    assert found.dtype == torch.float32 and found.is_contiguous() and torch.equal(found, mask[0, 0])


@pytest.mark.parametrize("frames", [1, 2])
def test_frames_of_pictures_in_front_are_not_of_the_video(frames: int) -> None:
    given = noise(1, 16, 2 + frames, 6, 8)
    found = latent_tensors({"samples": given}, sampling(), TINY, Status(), references=frames)
    assert torch.equal(found["samples"], given[0])
    with pytest.raises(ValueError, match=f"samples is for 64x48, {1 + 4 * (1 + frames)} frames; this node makes"):
        tensors_of({"samples": given})
