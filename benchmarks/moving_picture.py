"""A picture that moves as nature's do, for the codec, and how much of it an mp4 has kept."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import torch
import torch.nn.functional as F
from wan_pack.wan.video.yuv import frames_to_yuv


def moving_picture(frames: int, height: int, width: int, device: Any) -> Any:
    """[3, F, H, W] in [-1, 1]: patches of all sizes (equal strength per octave, as in nature), panned and enlarged."""
    random_ = torch.Generator().manual_seed(0)
    size, patches = (height * 3 // 2, width * 3 // 2), 2
    picture = torch.zeros(1, 3, *size, device=device)
    while patches * 3 <= size[0]:
        colours = torch.randn(1, 3, patches, 2 * patches, generator=random_).to(device)
        picture += F.interpolate(colours, size=size, mode="bicubic")
        patches *= 2
    picture = torch.tanh(picture / 2)
    made = []
    for index in range(frames):
        time_ = index / 80
        rows, columns = (torch.linspace(-0.6, 0.6, n, device=device) * (1 - 0.1 * time_) for n in (height, width))
        grid = torch.stack(torch.meshgrid(rows + 0.15 * time_, columns + 0.2 * time_, indexing="ij")[::-1], dim=-1)
        made.append(F.grid_sample(picture, grid[None], mode="bicubic", align_corners=False)[0])
    return torch.stack(made, dim=1).clamp_(-1, 1)


def quality(path: Path, picture: Any) -> str:
    """How near the file's luma is to the frames'."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "rawvideo", "-"]
    made = subprocess.run(command, capture_output=True, check=True).stdout
    _, frames, height, width = picture.shape
    made = torch.frombuffer(bytearray(made), dtype=torch.uint8).view(frames, -1, width)[:, :height].float()
    error = sum((a - frames_to_yuv(b[:, None])[0, :height].float().cpu()).square().mean().item()
                for a, b in zip(made, picture.unbind(1), strict=True))  # fmt: skip
    return f"{10 * torch.tensor(255**2 * frames / max(error, 1e-9)).log10().item():.1f} dB"
