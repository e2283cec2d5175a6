"""Frames -> an MP4 file, written while they are decoded."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import threading
from collections import deque
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

CRF = 16
"""x264's quality: visually lossless."""
STDERR_LINES = 20


class VideoInfo(NamedTuple):
    width: int
    height: int
    frames: int
    fps: float


def frames_to_bytes(frames: Tensor) -> Tensor:
    """Frames [3, n, H, W] in [-1, 1] -> [n, H, W, 3] uint8 on the CPU."""
    if frames.dim() != 4 or frames.shape[0] != 3:
        raise ValueError(f"frames have shape {list(frames.shape)}; it must be [3, n, H, W]")
    levels = (frames.float().clamp(-1.0, 1.0) + 1.0).mul_(127.5).round_()
    return levels.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu()


class VideoWriter:
    """Streams frames into an H.264 MP4 that browsers play. A context manager.

    The file appears under its name when the block ends well; on an error nothing is left.
    ffmpeg is imageio-ffmpeg's binary, but started here: its writer neither reports ffmpeg's exit status nor keeps what
    ffmpeg said, so a full disk would leave a broken file and no error.

    Args:
        path: of the .mp4.
        width, height: pixels, even.
        fps: frames per second.
    Raises:
        ValueError: sizes that H.264 cannot take.
        RuntimeError: ffmpeg is missing or failed; the message ends with its last words.
    """

    def __init__(self, path: str | Path, *, width: int, height: int, fps: float) -> None:
        for name, value in (("width", width), ("height", height)):
            if value < 2 or value % 2:
                raise ValueError(f"{name} is {value}; it must be even")
        self.path = Path(path)
        self.width, self.height, self.fps = width, height, fps
        self.frames = 0
        """Written so far."""
        self._part = self.path.with_name(f".{self.path.stem}.{os.getpid()}.part{self.path.suffix}")
        self._words: deque[str] = deque(maxlen=STDERR_LINES)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> VideoWriter:
        import imageio_ffmpeg

        rate = Fraction(self.fps).limit_denominator(1001)
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "warning", "-nostats"]
        command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{self.width}x{self.height}"]
        command += ["-r", str(rate), "-i", "-", "-an"]
        # Converted and tagged as BT.709: untagged, players guess by the size of the frame, and some guess wrong.
        tags = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
        command += ["-vf", f"scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,{tags}"]
        command += ["-c:v", "libx264", "-crf", str(CRF), "-pix_fmt", "yuv420p", "-movflags", "+faststart"]
        command += ["-f", "mp4", str(self._part.absolute())]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
        except OSError as error:
            raise RuntimeError(f"ffmpeg cannot be started: {error}") from error
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()
        return self

    def write(self, frames: Tensor) -> None:
        """Appends frames [3, n, H, W] in [-1, 1]."""
        assert self._process is not None and self._process.stdin is not None, "write() outside of the with block"
        if tuple(frames.shape[2:]) != (self.height, self.width):
            raise ValueError(f"frames are {list(frames.shape)}; they must be [3, n, {self.height}, {self.width}]")
        try:
            self._process.stdin.write(frames_to_bytes(frames).numpy().data)
        except OSError as error:
            self._end()
            raise self._failure() from error
        self.frames += frames.shape[1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        try:
            if kind is not None:
                self._process.kill()
            if self._end() == 0 and kind is None and self.frames:
                os.replace(self._part, self.path)
            elif kind is None:
                raise self._failure()
        finally:
            self._part.unlink(missing_ok=True)

    def _end(self) -> int:
        """Closes ffmpeg's input and waits for it; its exit status."""
        assert self._process is not None and self._process.stdin is not None
        # Flushing what ffmpeg no longer reads fails; the exit status tells why.
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        status = self._process.wait()
        self._reader.join()
        return status

    def _failure(self) -> RuntimeError:
        assert self._process is not None
        if not self.frames and self._process.returncode == 0:
            return RuntimeError(f"{self.path} was not written: no frames")
        words = "\n".join(self._words) or "it said nothing"
        reason = "the disk is full; " if os.strerror(errno.ENOSPC) in words else ""
        return RuntimeError(
            f"{self.path} was not written: {reason}ffmpeg ended with status {self._process.returncode} "
            f"after {self.frames} frames:\n{words}"
        )

    def _listen(self) -> None:
        assert self._process is not None and self._process.stderr is not None
        with self._process.stderr as stream:
            for line in stream:
                self._words.append(line.decode(errors="replace").rstrip()[:500])


def probe(path: str | Path) -> VideoInfo:
    """Reads a video's size, number of frames and rate. ValueError if it is not a video."""
    import imageio_ffmpeg

    try:
        reader = imageio_ffmpeg.read_frames(str(path))
        about = next(reader)
        frames = sum(1 for _ in reader)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is not a video: {str(error).strip().splitlines()[-1]}") from error
    return VideoInfo(*about["size"], frames, about["fps"])
