"""The VAE split over ranks by image rows: the same arithmetic, whose rounding may differ with the height in bf16.

Every rank runs the encoder or decoder on its rows. What looks at other rows gets them first: a convolution one row from
each neighbour (halo exchange: Dryden et al., 2019, arXiv 1903.06681), the attention in the middle all ranks' keys and
values. Everything else in the VAE works on single positions or on blocks that a rank's share of the rows never cuts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ...wan.model.latent_space import FRAMES_AT_ONCE
from ...wan.vae.autoencoder import check_video, decode_frames, encode, load_vae, upscale
from ...wan.vae.vae_layers import channels_last
from .image_rows import ImageShard

log = logging.getLogger(__name__)


class RankVae:
    """A rank's VAE. Its calls are collective: every rank of the group makes the same ones, with equal inputs.

    A picture with fewer latent rows than there are ranks is not split.

    Args:
        files: as for `load_vae`.
        group: of all ranks; None for one.
        ops: a name in `vae_ops.VAE_OPS`.
    Raises:
        ValueError: the files are not a VAE's.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        *,
        dtype: torch.dtype,
        device: torch.device,
        group: dist.ProcessGroup | None,
        ops: str = "plain",
    ) -> None:
        self._vae = load_vae(files, dtype=dtype, device=device)
        channels_last(self._vae)
        self.upscale = upscale(self._vae)
        """Pixels per row and column of what `decode` makes for one of the video."""
        self._group, self._ops = group, ops

    def decode(self, latents: Tensor, *, clamp: bool = True, at_once: int = FRAMES_AT_ONCE) -> Iterator[Tensor | None]:
        """Decodes part by part, as `wan.vae.autoencoder.decode_frames` does. Every rank must run through all parts.

        Args:
            latents: the whole [1, z_dim, T, h, w], normalised.
            clamp, at_once: as for `decode_frames`.
        Yields:
            On rank 0 whole frames [3, n, H, W] in [-1, 1]. On the others None, or nothing if the picture is not split.
        """
        rows = self._rows(latents.shape[-2])
        if rows is None:
            if self._group is None or dist.get_rank(self._group) == 0:
                yield from decode_frames(self._vae, latents, ops=self._ops, clamp=clamp, at_once=at_once)
            return
        mine = rows.split(latents)
        for frames in decode_frames(self._vae, mine, rows=rows, ops=self._ops, clamp=clamp, at_once=at_once):
            yield rows.gather_to_first(frames)

    def encode(self, video: Tensor) -> Tensor:
        """The whole video [1, 3, F, H, W] in [-1, 1] -> [1, z_dim, T, h, w] on every rank.

        As `wan.vae.autoencoder.encode` does.
        """
        check_video(self._vae, video)
        rows = self._rows(video.shape[-2] // self._vae.config["scale_factor_spatial"])
        if rows is None:
            return encode(self._vae, video, ops=self._ops)
        return rows.gather(encode(self._vae, rows.split(video), rows=rows, ops=self._ops))

    def splits(self, num_rows: int) -> bool:
        """Whether so many latent rows are spread over the ranks; else the first one decodes alone, and each encodes."""
        return self._group is None or num_rows >= dist.get_world_size(self._group)

    def _rows(self, num_rows: int) -> ImageShard | None:
        """This rank's share of `num_rows` latent rows, or None if the picture stays whole."""
        if self._group is None or (world := dist.get_world_size(self._group)) == 1:
            return None
        if num_rows < world:
            log.info("the VAE is not split: %d latent rows are fewer than %d ranks", num_rows, world)
            return None
        return ImageShard.of(num_rows, self._group)
