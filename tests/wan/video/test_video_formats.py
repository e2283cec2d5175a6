"""Every kind of file, decoded: its size, its frames and their colours."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import imageio_ffmpeg
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from wan_pack.distributed.machine.prerequisites import ffmpeg_problem
from wan_pack.wan.video.video import VideoWriter, probe
from wan_pack.wan.video.video_formats import FORMATS, H264
from wan_pack.wan.video.yuv import frames_to_rgb, frames_to_yuv

WIDTH, HEIGHT, FRAMES = 98, 66, 7
"""Chroma has odd numbers of rows and columns."""
INSIDE = {
    "h264 mp4": r"h264 .*yuv420p\(tv, bt709",
    "h265 mp4": r"hevc .*yuv420p10le\(tv, bt709",
    "prores mov": r"prores .*yuv422p10le\((tv, )?bt709",
    "ffv1 mp4": r"ffv1.* bgr0\(pc",
}


def frames() -> Tensor:
    """A smooth, coloured picture that moves."""
    coarse = torch.rand(3, 1, 3, 4, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    picture = F.interpolate(coarse, size=(HEIGHT, WIDTH + FRAMES), mode="bilinear")
    return torch.cat([picture[..., shift : shift + WIDTH] for shift in range(FRAMES)], dim=1)


def written(folder: Path, name: str, crf: int) -> Path:
    path = folder / f"video{FORMATS[name].suffix}"
    with VideoWriter(path, width=WIDTH, height=HEIGHT, fps=16, video_format=FORMATS[name], crf=crf) as writer:
        writer.write(frames()[:, :1])
        writer.write(frames()[:, 1:])
    return path


def decoded(path: Path, pixels: str) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", pixels]
    exact = ["-sws_flags", "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"]
    return subprocess.run([*command, *exact, "-"], capture_output=True, check=True).stdout


def levels(path: Path) -> Tensor:
    return torch.frombuffer(bytearray(decoded(path, "rgb24")), dtype=torch.uint8).view(-1, HEIGHT, WIDTH, 3)


@pytest.mark.processes
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_decoded_is_what_was_written(tmp_path: Path, name: str) -> None:
    assert ffmpeg_problem(FORMATS[name]) == ""
    path = written(tmp_path, name, 16)
    assert probe(path) == (WIDTH, HEIGHT, FRAMES, 16.0)
    about = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path)], capture_output=True, text=True).stderr
    assert re.search(INSIDE[name], about), about
    apart = (levels(path).float() - frames_to_rgb(frames()).float()).abs()
    assert apart.mean() < 2 and apart.quantile(0.999) < 12, (apart.mean(), apart.max())
    if name == "ffv1 mp4":
        assert not apart.any()


@pytest.mark.processes
def test_h264_at_crf_0_loses_nothing_of_what_it_is_given(tmp_path: Path) -> None:
    assert decoded(written(tmp_path, H264, 0), "yuv420p") == frames_to_yuv(frames()).numpy().tobytes()


@pytest.mark.processes
@pytest.mark.parametrize("name", [name for name, made in FORMATS.items() if made.takes_crf])
def test_a_lower_crf_makes_a_larger_and_better_file(tmp_path: Path, name: str) -> None:
    seen = []
    for crf in (4, 40):
        path = written(tmp_path, name, crf)
        seen.append((path.stat().st_size, (levels(path).float() - frames_to_rgb(frames()).float()).abs().mean()))
    assert seen[0][0] > seen[1][0] and seen[0][1] < seen[1][1], seen


@pytest.mark.processes
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("crf", [0, 16])
def test_no_file_is_larger_than_the_disk_is_asked_for(tmp_path: Path, name: str, crf: int) -> None:
    made, size = FORMATS[name], 256
    path = tmp_path / f"noise{made.suffix}"
    noise = torch.rand(3, 5, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with VideoWriter(path, width=size, height=size, fps=16, video_format=made, crf=crf) as writer:
        writer.write(noise)
    assert path.stat().st_size <= made.pixel_bytes(crf) * noise[0].numel()


def copied(source: Path, target: Path) -> Path:
    """Packet by packet, as ComfyUI saves a video that it need not encode anew."""
    av = pytest.importorskip("av")
    with av.open(str(source)) as video, av.open(str(target), "w") as copy:
        stream = copy.add_stream_from_template(template=video.streams.video[0], opaque=True)
        for packet in video.demux(video.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    return target


@pytest.mark.processes
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "prores mov"])
@pytest.mark.parametrize("count", [1, 5, 17])
def test_no_frame_is_lost_where_a_video_is_saved_and_saved_again(tmp_path: Path, name: str, count: int) -> None:
    """By this pack, and by Save Video, which calls every file mp4."""
    picture = torch.rand(3, count, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    path = tmp_path / f"video{FORMATS[name].suffix}"
    with VideoWriter(path, width=64, height=32, fps=16, video_format=FORMATS[name], crf=16) as writer:
        writer.write(picture)
    again = copied(copied(path, tmp_path / f"saved{path.suffix}"), tmp_path / "again.mp4")
    assert len(decoded(again, "rgb24")) == count * 32 * 64 * 3 and probe(again).fps == 16
    assert decoded(again, "rgb24") == decoded(path, "rgb24")


@pytest.mark.processes
@pytest.mark.parametrize("name", FORMATS)
def test_the_narrowest_videos_are_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"video{FORMATS[name].suffix}"
    picture = torch.rand(3, 5, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with VideoWriter(path, width=48, height=32, fps=16, video_format=FORMATS[name], crf=16) as writer:
        writer.write(picture)
    assert len(decoded(path, "rgb24")) == 5 * 32 * 48 * 3


def test_blocks_of_x265_are_small_in_narrow_videos_only() -> None:
    wide, narrow = (" ".join(FORMATS["h265 mp4"].options(16, width)) for width in (64, 48))
    assert "ctu=16" in narrow and "ctu" not in wide
