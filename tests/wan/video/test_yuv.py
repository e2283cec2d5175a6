"""Frames on their way to H.264 have the colours that ffmpeg would give them."""

from __future__ import annotations

import subprocess

import imageio_ffmpeg
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from wan_pack.wan.video.yuv import frames_to_rgb, frames_to_yuv

HEIGHT, WIDTH = 98, 130
"""Not multiples of 4: rows and columns of chroma are odd in number."""


def _by_ffmpeg(frames: Tensor) -> Tensor:
    """8-bit RGB, converted by swscale with exact rounding."""
    levels = ((frames.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()
    scale = "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{WIDTH}x{HEIGHT}", "-i", "-", "-vf", scale, "-pix_fmt", "yuv420p", "-f", "rawvideo", "-"]
    made = subprocess.run(command, input=levels.numpy().tobytes(), capture_output=True, check=True).stdout
    return torch.frombuffer(bytearray(made), dtype=torch.uint8).view(-1, HEIGHT * 3 // 2, WIDTH)


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["noise", "corners", "smooth", "beyond", "greys"])
def test_has_the_colours_that_ffmpeg_gives(kind: str) -> None:
    """At most one level apart, and on average not at all, in each of the three planes."""
    noise = torch.rand(3, 2, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1
    frames = {
        "noise": noise,
        "corners": noise.sign(),
        "smooth": F.interpolate(noise[..., :6, :8], size=(HEIGHT, WIDTH), mode="bilinear").bfloat16(),
        "beyond": 3 * noise,
        "greys": torch.linspace(-1, 1, 256).view(1, 256, 1, 1).expand(3, 256, HEIGHT, WIDTH),
    }[kind]
    apart = frames_to_yuv(frames).flatten(1).int() - _by_ffmpeg(frames).flatten(1).int()
    pixels = HEIGHT * WIDTH
    for plane in apart.split([pixels, pixels // 4, pixels // 4], dim=1):
        assert plane.abs().max() <= 1
        assert plane.float().mean().abs() < 0.03


def test_greys_are_rounded_exactly() -> None:
    greys = torch.arange(256.0)
    frames = (greys / 127.5 - 1).view(1, 256, 1, 1).expand(3, 256, 2, 2)
    yuv = frames_to_yuv(frames)
    assert yuv.shape == (256, 3, 2) and yuv.is_contiguous()
    assert torch.equal(yuv[:, 0, 0].double(), (16 + 219 * greys.double() / 255).round())
    assert (yuv[:, 2] == 128).all()


def test_ten_bits_are_four_times_eight() -> None:
    noise = torch.rand(3, 2, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1
    deep = frames_to_yuv(noise, bits=10)
    assert deep.dtype == torch.int16
    # Half a level of each.
    assert (deep / 4 - frames_to_yuv(noise).float()).abs().max() <= 0.5 + 0.125
    assert (deep % 4).unique().tolist() == [0, 1, 2, 3]


def test_rows_of_chroma_are_halved_or_not() -> None:
    columns = torch.rand(3, 2, 1, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1
    frames = columns.expand(3, 2, HEIGHT, WIDTH)
    few, all_of_them = frames_to_yuv(frames), frames_to_yuv(frames, halve_rows=False)
    assert all_of_them.shape == (2, 2 * HEIGHT, WIDTH)
    assert torch.equal(all_of_them[:, :HEIGHT], few[:, :HEIGHT])
    chroma = few[:, HEIGHT:].reshape(2, 2, HEIGHT // 2, WIDTH // 2)
    assert torch.equal(all_of_them[:, HEIGHT:].reshape(2, 2, HEIGHT, WIDTH // 2), chroma.repeat_interleave(2, dim=2))


def test_rgb_is_rounded_once() -> None:
    greys = (torch.arange(256.0) / 127.5 - 1).view(1, 256, 1, 1).expand(3, 256, 2, 2)
    assert torch.equal(frames_to_rgb(greys)[:, 0, 0, 0], torch.arange(256, dtype=torch.uint8))
    one = torch.tensor([2.0, -2.0, 0.0]).view(3, 1, 1, 1)
    assert frames_to_rgb(one).tolist() == [[[[255, 0, 128]]]]


def test_shapes_are_checked() -> None:
    for shape in ((5, 3, 2, 2), (3, 1, 3, 2), (3, 1, 2, 3), (3, 2, 2)):
        with pytest.raises(ValueError, match=r"\[3, n, H, W\] with even H and W"):
            frames_to_yuv(torch.zeros(shape))


@pytest.mark.parametrize(("bits", "least", "most"), [(8, 0, 255), (10, 0, 1023)])
def test_chroma_beyond_what_a_sample_holds_is_the_nearest_that_it_does(bits: int, least: int, most: int) -> None:
    """Rows of the two fullest colours, so that the filter that halves them overshoots most, to 265 and -9."""
    blue, yellow = torch.tensor([-1.0, -1.0, 1.0]), torch.tensor([1.0, 1.0, -1.0])
    rows = yellow.repeat(10, 1)
    rows[3:7] = blue
    for colours, level in ((rows, most), (-rows, least)):
        frames = colours.t()[:, None, :, None].expand(3, 1, 10, 2)
        chroma = frames_to_yuv(frames, bits=bits)[0, 10:].reshape(2, 5)
        # Blue's own; the middle one is made of rows 1 to 8.
        assert chroma[0, 2] == level
