"""The kinds of files that a video is written to: what ffmpeg is told, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass

CRF = 16
"""Of x264: visually lossless."""
MAX_CRF = 51
LOOKAHEAD = 20
"""Frames that x264 has seen before it encodes the first. With its own 40, and one for each thread, a short video was
decoded before that; as many bytes give the same quality either way."""
NARROW = 64
FRAME_PIXEL_BYTES = 3 * 2
"""Of frames that are kept as they are (frames_file.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoFormat:
    """A container and a codec."""

    suffix: str
    """Of the file's name."""
    media_type: str
    pixels: str
    """How ffmpeg is given frames, by its own name: a key of `video.PIXELS`."""
    encoder: tuple[str, ...]
    """ffmpeg's options for it; the second is its name."""
    muxer: tuple[str, ...]
    """Those for the container."""
    takes_crf: bool
    narrow: str = ""
    """What its last option goes on with for a video narrower than `NARROW` pixels."""
    bytes_per_pixel: float
    """Of a file, at most: noise, at the best quality."""

    @property
    def codec(self) -> str:
        """ffmpeg's name of the encoder."""
        return self.encoder[1]

    def options(self, crf: int, width: int) -> list[str]:
        """Of the encoder and its container. width: pixels."""
        quality = ["-crf", str(crf)] if self.takes_crf else []
        encoder = [*self.encoder]
        if width < NARROW and self.narrow:
            encoder[-1] += self.narrow
        return [*encoder, *quality, *self.muxer]

    def pixel_bytes(self, crf: int) -> float:
        """As `bytes_per_pixel`, at this quality."""
        # Measured with noise: 0.75 (h264) and 0.82 (h265).
        return 0.9 if self.takes_crf and crf >= CRF else self.bytes_per_pixel


H264 = "h264 mp4"
MP4 = ("-movflags", "+faststart", "-f", "mp4")
FORMATS: dict[str, VideoFormat] = {
    H264: VideoFormat(
        suffix=".mp4", media_type="video/mp4", pixels="yuv420p", takes_crf=True, bytes_per_pixel=1.6,
        encoder=("-c:v", "libx264", "-preset", "medium", "-rc-lookahead", str(LOOKAHEAD), "-pix_fmt", "yuv420p"),
        muxer=MP4,
    ),
    # Ten bits: in eight, dark gradients show steps.
    "h265 mp4": VideoFormat(
        suffix=".mp4", media_type="video/mp4", pixels="yuv420p10le", takes_crf=True, bytes_per_pixel=1.6,
        encoder=("-c:v", "libx265", "-preset", "medium", "-pix_fmt", "yuv420p10le",
                 "-x265-params", "log-level=error"),
        # With its usual blocks of 64 pixels x265 may crash.
        narrow=":ctu=16",
        muxer=MP4,
    ),
    "prores mov": VideoFormat(
        suffix=".mov", media_type="video/quicktime", pixels="yuv422p10le", takes_crf=False,
        bytes_per_pixel=1.0,
        encoder=("-c:v", "prores_ks", "-profile:v", "hq", "-vendor", "apl0", "-pix_fmt", "yuv422p10le"),
        muxer=("-f", "mov"),
    ),
    # Copied out of a Matroska file and into an mp4, as ComfyUI does, a short video loses its last frame.
    "ffv1 mp4": VideoFormat(
        suffix=".mp4", media_type="video/mp4", pixels="rgb24", takes_crf=False,
        bytes_per_pixel=3.5,
        encoder=("-c:v", "ffv1", "-level", "3", "-g", "1", "-slicecrc", "1", "-pix_fmt", "bgr0"),
        muxer=MP4,
    ),
}  # fmt: skip
"""Each by the name that users choose it by."""


def media_type(suffix: str) -> str:
    """Of a file that has one of their suffixes."""
    return next(known.media_type for known in FORMATS.values() if known.suffix == suffix)
