"""What ffmpeg is told, what it is heard to say, and what is said of a file that is no video."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import imageio_ffmpeg
import pytest
import torch
from ffmpegs import put_ffmpeg
from wan_pack.wan.video.video import VideoWriter, probe
from wan_pack.wan.video.video_formats import FORMATS, H264, media_type
from wan_pack.wan.video.yuv import frames_to_rgb, frames_to_yuv

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for ffmpeg"),
]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of what a script in the place of ffmpeg is told, line by line."""
    told = tmp_path / "told"
    script = f"printf '%s\\n' \"$@\" > '{told}'\nfor last; do :; done\nexec cat > \"$last\"\n"
    put_ffmpeg(tmp_path, monkeypatch, script)
    return told


@pytest.mark.parametrize(
    ("name", "fps", "rate", "cores", "threads", "colours"),
    [
        (H264, 16, "16", 64, "16", "color_primaries=bt709:color_trc=bt709:colorspace=bt709:range=tv"),
        ("ffv1 mp4", 23.976, "2997/125", 4, "4", "color_primaries=bt709:color_trc=bt709:colorspace=gbr:range=pc"),
        ("h265 mp4", 30000 / 1001, "30000/1001", None, "1",
         "color_primaries=bt709:color_trc=bt709:colorspace=bt709:range=tv"),
    ],
)  # fmt: skip
def test_ffmpeg_is_told_what_it_is_given(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fps: float, rate: str, cores: int | None,
    threads: str, colours: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    made = FORMATS[name]
    path = tmp_path / f"x{made.suffix}"
    frames = torch.rand(3, 3, 48, 64) * 2 - 1
    with VideoWriter(path, width=64, height=48, fps=fps, video_format=made, crf=21) as writer:
        writer.write(frames)
    *told, last = asked.read_text().splitlines()
    given = ["-f", "rawvideo", "-pix_fmt", made.pixels, "-s", "64x48", "-r", rate, "-i", "-", "-an"]
    expected = ["-y", "-v", "warning", "-nostats", *given, "-vf", f"setparams={colours}", "-threads", threads]
    assert told == [*expected, *made.options(21, 64)]
    assert Path(last) == tmp_path / f".x.{os.getpid()}.part{made.suffix}" and not Path(last).exists()
    if name == H264:
        assert path.read_bytes() == frames_to_yuv(frames).numpy().tobytes() and writer.frames == 3


def test_of_many_words_the_last_ones_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "cat > /dev/null\nfor i in $(seq 101 130); do printf '%s %0600d  \\n' $i 7 >&2; done\nexit 3\n"
    put_ffmpeg(tmp_path, monkeypatch, script)
    with (
        pytest.raises(RuntimeError) as failed,
        VideoWriter(tmp_path / "x.mp4", width=64, height=48, fps=16) as writer,
    ):
        writer.write(torch.zeros(3, 2, 48, 64))
    first, *words = str(failed.value).splitlines()
    assert first.endswith("x.mp4 was not written: ffmpeg ended with status 3 after 2 frames:")
    assert words == [f"{i} {'0' * 496}" for i in range(111, 131)]


@pytest.mark.parametrize(("name", "value"), [("width", 0), ("width", 7), ("height", 0), ("height", 5), ("height", -2)])
def test_sizes_that_no_encoder_takes_are_refused(tmp_path: Path, name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"^{name} is {value}; it must be even"):
        VideoWriter(tmp_path / "x.mp4", fps=16, **{"width": 64, "height": 48, name: value})
    VideoWriter(tmp_path / "x.mp4", width=2, height=2, fps=16)


@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_what_is_no_video_is_said_in_the_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def read_frames(path: str) -> None:
        raise error(f"Could not parse\nOutput:\n{path}: Invalid data\n\n")

    monkeypatch.setattr(imageio_ffmpeg, "read_frames", read_frames)
    path = tmp_path / "x.mp4"
    with pytest.raises(ValueError, match=f"^{path} is not a video: {path}: Invalid data$"):
        probe(path)


def test_a_format_is_asked_for_its_quality_only_where_it_has_one() -> None:
    found = {name: ([made.pixel_bytes(crf) for crf in (0, 15, 16, 51)], made.codec) for name, made in FORMATS.items()}
    assert found == {
        "h264 mp4": ([1.6, 1.6, 0.9, 0.9], "libx264"), "h265 mp4": ([1.6, 1.6, 0.9, 0.9], "libx265"),
        "prores mov": ([1.0] * 4, "prores_ks"), "ffv1 mp4": ([3.5] * 4, "ffv1"),
    }  # fmt: skip
    for name, made in FORMATS.items():
        options = made.options(23, 640)
        assert ("-crf 23" in " ".join(options)) is made.takes_crf is name.startswith("h26")
    assert [media_type(suffix) for suffix in (".mp4", ".mov")] == ["video/mp4", "video/quicktime"]


def test_frames_of_half_precision_are_rounded_in_float32() -> None:
    frames = (torch.rand(3, 2, 4, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1).bfloat16()
    for made in (frames_to_rgb, frames_to_yuv):
        assert torch.equal(made(frames), made(frames.float())) and made(frames).is_contiguous()
