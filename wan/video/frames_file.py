"""A video's frames as the VAE made them, in a file: no codec rounds them."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from .video_formats import FRAME_PIXEL_BYTES

LEVELS = 65535
"""Of a sample, beside 0: half of the bytes of float32, at most 1/131070 off it. float16 would be up to 1/4096 off."""
OFFSET = 32768
"""A sample is an int16, which every version of torch computes with: this much below its level."""
READ_FRAMES = 8
"""At a time, on their way to float32."""


class FramesWriter:
    """Writes frames to a file. A context manager; the file appears under its name when the block ends well, and on an
    error nothing is left.

    Raises:
        RuntimeError: they cannot be written; the message says why.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.frames = path, 0
        self._part = path.with_name(f".{path.name}.{os.getpid()}.part")
        self._file: BinaryIO | None = None

    def __enter__(self) -> FramesWriter:
        self._file = self._part.open("wb", buffering=0)
        return self

    def write(self, frames: Tensor) -> None:
        """Appends frames [3, n, H, W] in [-1, 1]."""
        assert self._file is not None, "write() outside of the with block"
        levels = (frames.float().clamp(-1.0, 1.0) + 1.0).mul_(LEVELS / 2).round_().sub_(OFFSET)
        data = levels.to(torch.int16).permute(1, 2, 3, 0).contiguous().cpu().numpy().data.cast("B")
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise RuntimeError(f"{self.path} was not written: {reason}") from error
        self.frames += frames.shape[1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()
        if kind is None:
            os.replace(self._part, self.path)
        else:
            self._part.unlink(missing_ok=True)


def read_frames(path: Path, *, frames: int, width: int, height: int) -> Tensor:
    """What a FramesWriter wrote -> [frames, H, W, 3] float32 in 0 to 1, as ComfyUI's IMAGE.

    Raises:
        ValueError: the file does not have that many.
    """
    size = frames_bytes(frames=frames, width=width, height=height)
    if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; {frames} frames of {width}x{height} have {size}")
    images = torch.empty(frames, height, width, 3)
    with path.open("rb", buffering=0) as file:
        for some in images.split(READ_FRAMES):
            levels = torch.empty(some.shape, dtype=torch.int16)
            data = levels.numpy().data.cast("B")
            while data:
                read = file.readinto(data)
                if not read:
                    raise ValueError(f"{path} has become shorter")
                data = data[read:]
            some.copy_(levels).add_(OFFSET).div_(LEVELS)
    return images


def frames_bytes(*, frames: int, width: int, height: int) -> int:
    """Of such a file."""
    return frames * width * height * FRAME_PIXEL_BYTES
