"""Frames -> a video file, written while they are decoded."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import subprocess
import threading
from collections import deque
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from torch import Tensor

from .arriving import Arriving
from .video_formats import CRF, FORMATS, H264, VideoFormat
from .yuv import frames_to_rgb, frames_to_yuv

THREADS = 16
"""The encoder's, at most. By itself x264 takes half as many again as there are cores, and on large machines has more
frames in work than a video has."""
PIXELS: dict[str, Callable[[Tensor], Tensor]] = {
    "yuv420p": frames_to_yuv,
    "yuv420p10le": partial(frames_to_yuv, bits=10),
    "yuv422p10le": partial(frames_to_yuv, bits=10, halve_rows=False),
    "rgb24": frames_to_rgb,
}
"""ffmpeg's name -> frames [3, n, H, W] in [-1, 1] as ffmpeg takes them, [n, ...]."""
STDERR_LINES = 20
SECONDS_FOR_WORDS = 0.2
PARTS_AHEAD = 2
"""Parts that may wait for ffmpeg while the next one is decoded."""


class VideoInfo(NamedTuple):
    width: int
    height: int
    frames: int
    fps: float


class VideoWriter:
    """Streams frames into a video file. A context manager.

    A thread of its own waits for the frames to leave the GPU and for ffmpeg to take them, so that the next ones are
    decoded meanwhile.

    The file appears under its name when the block ends well; on an error nothing is left.
    ffmpeg is imageio-ffmpeg's binary, but started here: its writer neither reports ffmpeg's exit status nor keeps what
    ffmpeg said, so a full disk would leave a broken file and no error.

    Args:
        path: of the file, with the format's suffix.
        width, height: pixels, even.
        fps: frames per second.
        video_format: by default an H.264 MP4, which browsers play.
        crf: of formats that take one; lower is better.
        on_loss: called when ffmpeg ends before it should, at once and on a thread of its own, with the error that
            `write` raises when it is next called: whoever decodes may be long in getting there.
    Raises:
        ValueError: sizes that the encoders cannot take.
        RuntimeError: ffmpeg is missing or failed; the message ends with its last words.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        width: int,
        height: int,
        fps: float,
        video_format: VideoFormat = FORMATS[H264],
        crf: int = CRF,
        on_loss: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        for name, value in (("width", width), ("height", height)):
            if value < 2 or value % 2:
                raise ValueError(f"{name} is {value}; it must be even")
        self.path = Path(path)
        self.width, self.height, self.fps = width, height, fps
        self._format, self._crf = video_format, crf
        self.frames = 0
        """That ffmpeg has taken so far."""
        self._part = self.path.with_name(f".{self.path.stem}.{os.getpid()}.part{self.path.suffix}")
        self._words: deque[str] = deque(maxlen=STDERR_LINES)
        self._process: subprocess.Popen[bytes] | None = None
        self._parts: queue.Queue[Arriving | None] = queue.Queue(PARTS_AHEAD)
        self._error: Exception | None = None
        """Why nothing more is written."""
        self._on_loss = on_loss
        self._ending = False
        """ffmpeg may end."""
        self._finished = False

    def __enter__(self) -> VideoWriter:
        try:
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
        except OSError as error:
            raise RuntimeError(f"ffmpeg cannot be started: {error}") from error
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._feeder = threading.Thread(target=self._feed, daemon=True)
        self._reader.start()
        self._feeder.start()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def _command(self) -> list[str]:
        import imageio_ffmpeg

        rate = Fraction(self.fps).limit_denominator(1001)
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "warning", "-nostats"]
        command += ["-f", "rawvideo", "-pix_fmt", self._format.pixels, "-s", f"{self.width}x{self.height}"]
        command += ["-r", str(rate), "-i", "-", "-an"]
        # Tagged as BT.709, as `frames_to_yuv` makes it: untagged, players guess by the size of the frame, and some
        # guess wrong.
        tags = "color_primaries=bt709:color_trc=bt709"
        tags += ":colorspace=gbr:range=pc" if self._format.pixels == "rgb24" else ":colorspace=bt709:range=tv"
        command += ["-vf", f"setparams={tags}", "-threads", str(min(THREADS, os.cpu_count() or 1))]
        return [*command, *self._format.options(self._crf, self.width), str(self._part.absolute())]

    def write(self, frames: Tensor) -> None:
        """Appends frames [3, n, H, W] in [-1, 1]. Waits only for what is more than `PARTS_AHEAD` calls back."""
        assert self._process is not None, "write() outside of the with block"
        if tuple(frames.shape[2:]) != (self.height, self.width):
            raise ValueError(f"frames are {list(frames.shape)}; they must be [3, n, {self.height}, {self.width}]")
        self._check()
        self._parts.put(Arriving(PIXELS[self._format.pixels](frames)))

    def finish(self) -> None:
        """Waits until all is encoded and puts the file in its place. The end of the block does it otherwise."""
        self._ending = True
        status = self._end()
        self._check()
        if status or not self.frames:
            raise self._failure()
        os.replace(self._part, self.path)
        self._finished = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        try:
            self._ending = True
            if kind is not None:
                self._process.kill()
                self._end()
            elif not self._finished:
                self.finish()
        finally:
            self._part.unlink(missing_ok=True)

    def _feed(self) -> None:
        assert self._process is not None and self._process.stdin is not None
        while (part := self._parts.get()) is not None:
            # After an error what still comes is taken and dropped: `write` must not wait for ever.
            if self._error is not None:
                continue
            try:
                data = part.there().numpy().data
                self._process.stdin.write(data)
                self.frames += len(data)
            except Exception as error:
                self._error = error

    def _check(self) -> None:
        """Raises what has kept frames from being written."""
        if isinstance(self._error, OSError):
            self._ending = True
            self._end()
            raise self._failure() from self._error
        if self._error is not None:
            raise self._error

    def _watch(self) -> None:
        assert self._process is not None
        self._process.wait()
        if self._ending:
            return
        # Closed by then, unless it has left a process behind.
        self._reader.join(SECONDS_FOR_WORDS)
        self._error = self._error or self._failure()
        self._part.unlink(missing_ok=True)
        self._on_loss(self._failure())

    def _end(self) -> int:
        """Lets ffmpeg have what is queued, closes its input and waits for it; its exit status."""
        assert self._process is not None and self._process.stdin is not None
        if self._feeder.is_alive():
            self._parts.put(None)
            self._feeder.join()
        # Flushing what ffmpeg no longer reads fails; the exit status tells why.
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        status = self._process.wait()
        self._reader.join()
        return status

    def _failure(self) -> RuntimeError:
        assert self._process is not None
        if not self.frames and self._process.returncode == 0 and self._ending:
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
    width, height = about["size"]
    return VideoInfo(width, height, frames, about["fps"])
