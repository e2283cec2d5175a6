"""Where the camera is at each frame, added to the tokens as they are embedded. (Wan Fun-Camera.)

The rays of all pixels, as Plücker coordinates (Sitzmann et al., 2021, arXiv 2106.02634), are embedded patch by patch,
as latents are, and go through two 3x3 convolutions over the patches of their frame. They are the same at every step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.config import WanConfig
from ..model.latent_space import PATCH_SIZE
from ..model.patch import patchify
from .part import Split, bytes_of, places
from .patch_embedding import PatchEmbedding


class CameraBlock(nn.Module):
    """Convolutions over one frame's patches, with what comes in added to what comes out."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: [C, rows, columns] -> the same."""
        changed: Tensor = self.conv2(F.relu(self.conv1(x)))
        return x + changed


class CameraAdapter(nn.Module):
    """The tokens of whole frames -> what is added to each."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.conv = PatchEmbedding(config.camera_dim, config.dim, PATCH_SIZE[1:])
        self.residual_blocks = nn.Sequential(CameraBlock(config.dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [rows, columns, 4 * camera_dim] of a frame -> [rows * columns, C]."""
        embedded: Tensor = self.residual_blocks(self.conv(tokens).permute(2, 0, 1))
        return embedded.flatten(1).T


@dataclass(slots=True)
class Camera:
    """Of one video, for one expert; on one rank, if at all."""

    values: Tensor
    """[n, T, height, width] float32: the rays of each pixel, of the frames of a latent one behind each other. On a rank
    the tokens of those frames of which it has some, [frames, rows, columns, 4 * camera_dim], in the host's memory."""
    stride: int
    """Pixels per latent row and column."""
    rows: Tensor | None = None
    """[S] int64: which of those tokens is at which of the rank's. What fills a rank up has any."""
    keep: bool = True
    """Keep what is derived of it between steps; costs S * C elements."""
    _embedded: Tensor | None = None

    def on_rank(self, split: Split, length: int) -> Camera:
        rows, columns = (
            size // (self.stride * patch) for size, patch in zip(self.values.shape[2:], PATCH_SIZE[1:], strict=True)
        )
        index = places(split, length).clamp(min=0)
        frames, which = (index // (rows * columns)).unique(return_inverse=True)
        # A latent pixel's pixels behind each other, row by row.
        rays = F.pixel_unshuffle(self.values[:, frames].movedim(0, 1), self.stride).movedim(0, 1)
        tokens = patchify(rays).view(len(frames), rows, columns, -1)
        return Camera(tokens, self.stride, which * rows * columns + index % (rows * columns), self.keep)

    def on_device(self, device: torch.device) -> Camera:
        return replace(self, rows=None if self.rows is None else self.rows.to(device))

    def for_expert(self, *, keep: bool) -> Camera:
        return replace(self, keep=keep)

    def device_bytes(self) -> int:
        return bytes_of(self.rows, self._embedded)

    def added_to(self, x: Tensor, adapter: nn.Module) -> Tensor:
        """x: a rank's tokens as embedded, [S, C] float32."""
        assert self.rows is not None, "the camera is on a rank"
        if self._embedded is not None:
            return x + self._embedded
        # Frame by frame: a video's are as large as its residual stream many times over.
        frames = [adapter(frame.to(x.device)) for frame in self.values]
        embedded = torch.cat(frames)[self.rows]
        del frames
        if self.keep:
            self._embedded = embedded
        return x + embedded
