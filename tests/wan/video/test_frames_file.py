"""Frames in a file: what was written is read, within what is promised, or nothing is left."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from wan_pack.wan.video.frames_file import LEVELS, FramesWriter, frames_bytes, read_frames

SIZE = {"frames": 11, "width": 6, "height": 4}


def _frames() -> torch.Tensor:
    noise = torch.rand(3, 11, 4, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise[:, 0], noise[:, 1], noise[:, 2] = -1.0, 1.0, 1.5
    return noise


def test_frames_are_read_as_comfyuis_image(tmp_path: Path) -> None:
    path = tmp_path / "frames"
    frames = _frames()
    with FramesWriter(path) as writer:
        writer.write(frames[:, :1])
        writer.write(frames[:, 1:])
        assert not path.exists()
    assert writer.frames == 11 and [entry.name for entry in tmp_path.iterdir()] == ["frames"]
    assert path.stat().st_size == frames_bytes(**SIZE) == 11 * 6 * 4 * 6
    images = read_frames(path, **SIZE)
    assert images.dtype == torch.float32 and images.shape == (11, 4, 6, 3)
    expected = (frames.clamp(-1, 1).double() + 1).permute(1, 2, 3, 0) / 2
    # Half a level, and float32's own rounding.
    assert (images.double() - expected).abs().max() <= 0.5 / LEVELS + 1e-7
    assert (images[0] == 0).all() and (images[1:3] == 1).all()


def test_a_file_of_another_length_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "frames"
    with FramesWriter(path) as writer:
        writer.write(_frames())
    with pytest.raises(ValueError, match="has 1584 bytes; 10 frames of 6x4 have 1440"):
        read_frames(path, **{**SIZE, "frames": 10})


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), FramesWriter(tmp_path / "frames") as writer:
        writer.write(_frames())
        raise KeyError
    assert list(tmp_path.iterdir()) == []


class Full:
    """A file on a disk that takes a part and then no more."""

    def __init__(self) -> None:
        self.taken = 0

    def write(self, data: Any) -> int:
        if self.taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.taken = len(data) // 2
        return self.taken

    def close(self) -> None:
        pass


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    path = tmp_path / "frames"
    writer = FramesWriter(path)
    with pytest.raises(RuntimeError, match=r"frames was not written: the disk is full$"), writer:
        writer._file.close()  # type: ignore[union-attr]
        writer._file = Full()  # type: ignore[assignment]
        writer.write(_frames())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frames_of_half_precision_are_rounded_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    frames = _frames().to(dtype)
    for name, given in (("half", frames), ("float", frames.float())):
        with FramesWriter(tmp_path / name) as writer:
            writer.write(given)
    assert (tmp_path / "half").read_bytes() == (tmp_path / "float").read_bytes()


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "frames"
    with FramesWriter(path) as writer:
        writer.write(_frames())
    size = path.stat()
    path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(Path, "stat", lambda self, **more: size)
    with pytest.raises(ValueError, match="frames has become shorter"):
        read_frames(path, **SIZE)
