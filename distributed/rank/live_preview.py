"""The picture that the user sees while a video is sampled."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from ...wan.model.patch import unpatchify
from ...wan.vae.preview import PreviewMap, is_due
from ..parallel.sequence import SequenceShard

JPEG_QUALITY = 90


class PreviewWriter:
    """Writes the middle latent frame of what the model expects the video to become. Changes nothing of it.

    Every rank calls it after every step: it gathers the tokens, which is collective, so when it does may depend on the
    step alone.

    Args:
        path: of the JPEG file; readers see the old one or the new one, never a part.
        preview_map: on the rank that writes; None on the others.
        grid: tokens per axis.
        group: of the ranks that share the sequence; None for one.
        steps: how many will run.
    """

    def __init__(
        self,
        path: Path,
        *,
        preview_map: PreviewMap | None,
        grid: tuple[int, int, int],
        shard: SequenceShard,
        group: dist.ProcessGroup | None,
        steps: int,
    ) -> None:
        self._path, self._map, self._steps = path, preview_map, steps
        self._grid, self._shard, self._group = grid, shard, group

    def __call__(self, done: int, estimate: Tensor) -> None:
        """`estimate`: this rank's tokens [S, channels] of the denoised video, after `done` steps."""
        if not is_due(done, self._steps):
            return
        tokens = self._shard.gather(estimate, self._group)
        if self._map is not None:
            latents = unpatchify(tokens, self._grid)
            self._write(self._map.picture(latents[:, latents.shape[1] // 2]))

    def _write(self, picture: Tensor) -> None:
        """[H, W, 3], uint8."""
        from PIL import Image

        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        Image.fromarray(picture.numpy()).save(draft, format="JPEG", quality=JPEG_QUALITY)
        os.replace(draft, self._path)
