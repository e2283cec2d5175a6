"""Frames that the encoder reads some at a time."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from wan_pack.wan.vae.vae_input import FrameParts

CPU = torch.device("cpu")


@pytest.mark.parametrize("patch", [None, 2])
def test_parts_are_the_frames_in_the_vaes_dtype_however_they_lie(patch: int | None) -> None:
    """As ComfyUI gives pictures, channels last, and one rank's rows of them."""
    pictures = torch.randn(9, 16, 10, 3).permute(3, 0, 1, 2)[None]
    for video in (pictures, pictures[..., 4:12, :], pictures.contiguous()):
        whole = video.bfloat16() if patch is None else patchify(video.bfloat16(), patch)
        parts = FrameParts(video, dtype=torch.bfloat16, device=CPU, patch=patch)
        assert parts.shape == tuple(whole.shape[2:])
        for start, end in ((0, 1), (1, 5), (5, 9)):
            assert torch.equal(parts.read(start, end), whole[:, :, start:end])


def test_another_device_gets_planes_of_one_part_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in one piece of memory and as it is given: the host converts and gathers nothing."""
    video, sent = torch.randn(1, 3, 9, 16, 10)[..., 4:12, :], []

    def copy(there: torch.Tensor, plane: torch.Tensor) -> torch.Tensor:
        assert (there.device.type, there.dtype, plane.dtype) == ("meta", torch.float32, torch.float32)
        assert plane.is_contiguous()
        sent.append(plane.clone())
        return there

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    parts = FrameParts(video, dtype=torch.bfloat16, device=torch.device("meta"), patch=2)
    made = parts.read(1, 5)
    assert (made.device.type, made.dtype, made.shape) == ("meta", torch.bfloat16, (1, 12, 4, 4, 5))
    assert torch.equal(torch.stack(sent).view(3, 4, 8, 10), video[0, :, 1:5])
