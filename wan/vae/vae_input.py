"""The frames that a VAE encodes, brought to it some at a time."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


class FrameParts:
    """Frames as the encoder reads them: on its device, in its dtype, patches of them as channels.

    They stay where they are until they are read: a GPU need not hold them all, nor wait for all of them. It gets them
    while it computes on those before, and converts them, which takes one core of the host longer than the encoder.

    Args:
        video: [1, C, F, H, W], on any device.
        patch: rows and columns that become channels; None: the frames are read as they are.
    """

    def __init__(self, video: Tensor, *, dtype: torch.dtype, device: torch.device, patch: int | None) -> None:
        self._video, self._dtype, self._device, self._patch = video, dtype, device, patch
        cuda = device.type == "cuda" and video.device != device
        self._stream = torch.cuda.Stream(device) if cuda else None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, rows and columns, as they are read."""
        patch = self._patch or 1
        frames, height, width = self._video.shape[2:]
        return frames, height // patch, width // patch

    def read(self, start: int, end: int) -> Tensor:
        """A run of the frames: [1, C * patch^2, n, H / patch, W / patch]."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

        part = self._video[:, :, start:end]
        if part.device != self._device:
            part = self._brought(part)
        part = part.to(self._dtype)
        return part if self._patch is None else patchify(part, patch_size=self._patch)

    def _brought(self, part: Tensor) -> Tensor:
        with self._beside():
            there = torch.empty(part.shape, dtype=part.dtype, device=self._device)
            # Plane by plane, each one piece of memory: the host need not gather them first.
            for to_channel, channel in zip(there[0], part[0], strict=True):
                for to_plane, plane in zip(to_channel, channel, strict=True):
                    to_plane.copy_(plane)
        if self._stream is not None:
            now = torch.cuda.current_stream(self._device)
            now.wait_stream(self._stream)
            # Or the next part would be written where this one is still read.
            there.record_stream(now)
        return there

    def _beside(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
