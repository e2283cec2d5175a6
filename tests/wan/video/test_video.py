"""The MP4 writer: what lands on the disk, and what is said when it cannot."""

from __future__ import annotations

import contextlib
import queue
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import imageio_ffmpeg
import pytest
import torch
from ffmpegs import put_ffmpeg
from patience import COMES_UP
from torch import Tensor
from wan_pack.wan.video import video
from wan_pack.wan.video.video import PARTS_AHEAD, VideoWriter, probe

pytestmark = pytest.mark.processes

COLOURS = ((1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (0.2, -0.3, 0.7), (0.5, 0.5, 0.5), (-1.0, -1.0, 1.0))


def _frames(width: int = 64, height: int = 48) -> Tensor:
    return torch.tensor(COLOURS).T[:, :, None, None].expand(3, len(COLOURS), height, width)


def _pixels(path: Path, width: int, height: int) -> Tensor:
    """The frames of a video, [n, H, W, 3]."""
    reader = imageio_ffmpeg.read_frames(str(path))
    assert next(reader)["codec"] == "h264"
    return torch.stack([torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in reader]).view(
        -1, height, width, 3
    )


def test_writes_what_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "a b'%d.mp4"
    frames = _frames()
    with VideoWriter(path, width=64, height=48, fps=16) as writer:
        writer.write(frames[:, :1])
        writer.write(frames[:, 1:].bfloat16())
        assert not path.exists()
    assert writer.frames == 5
    assert probe(path) == (64, 48, 5, 16.0)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    sent = (torch.tensor(COLOURS) + 1) * 127.5
    assert (_pixels(path, 64, 48).float().mean((1, 2)) - sent).abs().max() < 4
    # Players that are not told the colours guess.
    about = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path)], capture_output=True, text=True).stderr
    assert "yuv420p(tv, bt709, progressive)" in about
    # Players can start before the whole file is there.
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_x264_begins_while_a_short_video_is_still_decoded(tmp_path: Path) -> None:
    """By what it says of itself in the file: the frames that it has seen before the first one is encoded."""
    path = tmp_path / "x.mp4"
    with VideoWriter(path, width=64, height=48, fps=16) as writer:
        writer.write(_frames())
    said = dict(re.findall(rb"(\w+)=(\d+)", path.read_bytes()))
    assert int(said[b"threads"]) <= video.THREADS and int(said[b"mbtree"]) == 1
    # One for each of its threads, and those by which it sees B-frames coming.
    assert int(said[b"rc_lookahead"]) + video.THREADS + int(said[b"bframes"]) < 81 / 2


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), VideoWriter(tmp_path / "x.mp4", width=64, height=48, fps=16) as writer:
        writer.write(_frames())
        raise KeyError
    with (
        pytest.raises(ValueError, match=r"\[3, n, 48, 64\]"),
        VideoWriter(tmp_path / "x.mp4", width=64, height=48, fps=16) as writer,
    ):
        writer.write(_frames(width=32))
    with pytest.raises(RuntimeError, match="no frames"), VideoWriter(tmp_path / "x.mp4", width=64, height=48, fps=16):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_is_finished_is_there_before_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    with VideoWriter(path, width=64, height=48, fps=16) as writer:
        writer.write(_frames())
        writer.finish()
        assert probe(path).frames == 5
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_file_survives_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), VideoWriter(path, width=64, height=48, fps=16) as writer:
        writer.write(_frames())
        raise KeyError
    assert path.read_bytes() == b"old"


def test_ffmpegs_words_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "none" / "x.mp4"
    with (
        pytest.raises(RuntimeError, match="No such file or directory"),
        VideoWriter(path, width=640, height=480, fps=16) as writer,
    ):
        for _ in range(20):
            writer.write(_frames(640, 480))


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for ffmpeg")
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "cat > /dev/null\necho 'Error writing trailer: No space left on device' >&2\nexit 228\n"
    put_ffmpeg(tmp_path, monkeypatch, script)
    with (
        pytest.raises(RuntimeError, match=r"the disk is full; ffmpeg ended with status 228 after 5 frames"),
        VideoWriter(tmp_path / "x.mp4", width=64, height=48, fps=16) as writer,
    ):
        writer.write(_frames())
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "none"))
    with pytest.raises(RuntimeError, match="cannot be started"), VideoWriter("x.mp4", width=64, height=48, fps=16):
        pass


@pytest.fixture
def late_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the place of ffmpeg: takes nothing before this file exists, then writes what it is given."""
    go = tmp_path / "go"
    script = f"for last; do :; done\nwhile [ ! -e '{go}' ]; do sleep 0.02; done\nexec cat > \"$last\"\n"
    put_ffmpeg(tmp_path, monkeypatch, script)
    return go


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for ffmpeg")
def test_nobody_waits_for_an_ffmpeg_that_is_a_few_parts_behind(late_ffmpeg: Path, tmp_path: Path) -> None:
    """Each part is larger than what a pipe holds."""
    parts = [torch.full((3, 2, 256, 256), level) for level in (-1.0, 0.0, 1.0)][:PARTS_AHEAD]
    with VideoWriter(tmp_path / "x.mp4", width=256, height=256, fps=16) as writer:
        for part in parts:
            writer.write(part)
            # The decoder goes on with the memory that the frames were in.
            part.fill_(0.3)
        assert writer.frames == 0
        late_ffmpeg.touch()
    assert writer.frames == 2 * PARTS_AHEAD
    luma, pixels = (16, 126, 235)[:PARTS_AHEAD], 256 * 256
    frames = [bytes([level]) * pixels + bytes([128]) * (pixels // 2) for level in luma for _ in range(2)]
    assert (tmp_path / "x.mp4").read_bytes() == b"".join(frames)


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for ffmpeg")
def test_an_error_does_not_wait_for_ffmpeg(late_ffmpeg: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyError), VideoWriter(tmp_path / "x.mp4", width=256, height=256, fps=16) as writer:
        for _ in range(PARTS_AHEAD):
            writer.write(_frames(256, 256))
        raise KeyError
    assert [entry.name for entry in tmp_path.iterdir()] == ["ffmpeg"]


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for ffmpeg")
@pytest.mark.parametrize("status", [3, 0])
def test_fault_33_ffmpegs_end_is_told_while_the_next_part_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    go = tmp_path / "go"
    script = f"while [ ! -e '{go}' ]; do sleep 0.02; done\necho 'x264 gave up' >&2\nexit {status}\n"
    put_ffmpeg(tmp_path, monkeypatch, script)
    told: queue.Queue[Exception] = queue.Queue()
    with (
        pytest.raises(RuntimeError, match="x264 gave up"),
        VideoWriter(
            tmp_path / "x.mp4", width=64, height=48, fps=16,
            on_loss=told.put,
        ) as writer,
    ):  # fmt: skip
        go.touch()
        error = told.get(timeout=COMES_UP)
        assert f"ffmpeg ended with status {status} after 0 frames:\nx264 gave up" in str(error)
        writer.write(_frames())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["ffmpeg", "go"]


@pytest.mark.parametrize("fails", [False, True])
def test_an_end_that_was_asked_for_is_no_loss(tmp_path: Path, fails: bool) -> None:
    told: list[Exception] = []
    with (
        contextlib.suppress(KeyError),
        VideoWriter(tmp_path / "x.mp4", width=64, height=48, fps=16, on_loss=told.append) as writer,
    ):
        writer.write(_frames())
        if fails:
            raise KeyError
    time.sleep(0.1)
    assert told == []


def test_frames_that_cannot_leave_the_gpu_end_the_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(part: object) -> memoryview:
        raise RuntimeError("CUDA error: device lost")

    monkeypatch.setattr(video.Arriving, "there", lost)
    with (
        pytest.raises(RuntimeError, match="device lost"),
        VideoWriter(tmp_path / "x.mp4", width=64, height=48, fps=16) as writer,
    ):
        # More than may wait: who writes is not held up by what nobody takes.
        for _ in range(PARTS_AHEAD + 3):
            writer.write(_frames())
    assert list(tmp_path.iterdir()) == []


def test_nobody_waits_for_what_no_longer_takes_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the error comes between a look for it and the next part."""
    monkeypatch.setattr(video.Arriving, "there", Mock(side_effect=RuntimeError("CUDA error: device lost")))
    with (
        pytest.raises(RuntimeError, match="device lost"),
        VideoWriter(tmp_path / "x.mp4", width=64, height=48, fps=16) as writer,
        monkeypatch.context() as unseen,
    ):
        unseen.setattr(writer, "_check", lambda: None)
        writes = threading.Thread(target=lambda: [writer.write(_frames()) for _ in range(9)], daemon=True)
        writes.start()
        writes.join(COMES_UP)
        assert not writes.is_alive()
    assert PARTS_AHEAD < 8 and list(tmp_path.iterdir()) == []


def test_odd_sizes_and_no_video(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="width is 63"):
        VideoWriter(tmp_path / "x.mp4", width=63, height=48, fps=16)
    with pytest.raises(ValueError, match="is not a video"):
        probe(Path(__file__))
