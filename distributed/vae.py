"""The VAE split over ranks by image rows, exactly.

Every rank runs the library's own encoder or decoder on its rows. What looks at other rows gets them first: a
convolution one row from each neighbour (halo exchange: Dryden et al., 2019, arXiv 1903.06681), the attention in the
middle all ranks' keys and values. Everything else in the VAE works on single positions or on blocks that a rank's share
of the rows never cuts.

Shapes: B = batch, C = channels, T = frames, W = width, rows = image rows of this rank.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..wan.vae import check_video, decode_frames, encode, load_vae
from .rows import RowShard

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

log = logging.getLogger(__name__)


class RankVae:
    """A rank's VAE. Its calls are collective: every rank of the group makes the same ones, with equal inputs.

    A picture with fewer latent rows than there are ranks is not split.

    Args:
        files: as for `load_vae`.
        group: of all ranks; None for one.
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
    ) -> None:
        self._vae = load_vae(files, dtype=dtype, device=device)
        self._group = group

    def decode(self, latents: Tensor) -> Iterator[Tensor | None]:
        """Decodes chunk by chunk, as `wan.vae.decode_frames` does. Every rank must run through all chunks.

        Args:
            latents: the whole [1, z_dim, T, h, w], normalised.
        Yields:
            On rank 0 whole frames [3, n, H, W] in [-1, 1]. On the others None, or nothing if the picture is not split.
        """
        rows = self._rows(latents.shape[-2])
        if rows is None:
            if self._group is None or dist.get_rank(self._group) == 0:
                yield from decode_frames(self._vae, latents)
            return
        with split_vae(self._vae, rows):
            for frames in decode_frames(self._vae, rows.split(latents)):
                yield rows.gather_to_first(frames)

    def encode(self, video: Tensor) -> Tensor:
        """The whole video [1, 3, F, H, W] in [-1, 1] -> [1, z_dim, T, h, w] on every rank, as `wan.vae.encode` does."""
        check_video(self._vae, video)
        rows = self._rows(video.shape[-2] // self._vae.config.scale_factor_spatial)
        if rows is None:
            return encode(self._vae, video)
        with split_vae(self._vae, rows):
            return rows.gather(encode(self._vae, rows.split(video)))

    def _rows(self, num_rows: int) -> RowShard | None:
        """This rank's share of `num_rows` latent rows, or None if the picture stays whole."""
        world = 1 if self._group is None else dist.get_world_size(self._group)
        if world == 1:
            return None
        if num_rows < world:
            log.info("the VAE is not split: %d latent rows are fewer than %d ranks", num_rows, world)
            return None
        return RowShard.of(num_rows, self._group)


@contextmanager
def split_vae(vae: AutoencoderKLWan, rows: RowShard) -> Iterator[None]:
    """Inside, `vae`'s encoder and decoder work on this rank's rows. Afterwards the VAE is as it was.

    What is replaced is put back because the next picture may have another height.
    """
    whole = []
    try:
        for parent in [*vae.encoder.modules(), *vae.decoder.modules()]:
            for name, child in parent.named_children():
                split = _split_module(child, rows)
                if split is not None:
                    whole.append((parent, name, child))
                    setattr(parent, name, split)
        yield
    finally:
        for parent, name, child in whole:
            setattr(parent, name, child)


def _split_module(module: nn.Module, rows: RowShard) -> nn.Module | None:
    """What takes the place of `module`, or None if it never looks at other rows."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanCausalConv3d

    if isinstance(module, WanAttentionBlock):
        return _RowAttention(module, rows)
    if isinstance(module, WanCausalConv3d) and module.kernel_size[1] > 1:
        return _RowCausalConv3d(module, rows)
    if isinstance(module, nn.Conv2d) and module.padding == (1, 1):
        return _RowConv2d(module, rows)
    if isinstance(module, nn.ZeroPad2d):
        return _RowPad2d(module, rows)
    return None


class _RowCausalConv3d(nn.Module):
    """A 3x3x3 convolution that looks back in time, with the two frames before from the library's cache."""

    def __init__(self, conv: nn.Conv3d, rows: RowShard) -> None:
        super().__init__()
        assert conv.kernel_size == (3, 3, 3) and conv.stride == (1, 1, 1), conv
        self.conv, self.rows = conv, rows

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """[B, C, T, rows, W] -> [B, C', T, rows, W]; `cache_x` holds up to two frames."""
        # One buffer for the cached frames and all padding: the picture's edges and missing frames stay zero.
        padded = F.pad(x, (1, 1, 1, 1, 2, 0))
        if cache_x is not None:
            padded[:, :, 2 - cache_x.shape[2] : 2, 1:-1, 1:-1] = cache_x
        self.rows.fill_halo(padded, above=True)
        return F.conv3d(padded, self.conv.weight, self.conv.bias)


class _RowConv2d(nn.Module):
    """A 3x3 convolution, as after up-sampling."""

    def __init__(self, conv: nn.Conv2d, rows: RowShard) -> None:
        super().__init__()
        assert conv.kernel_size == (3, 3) and conv.stride == (1, 1), conv
        self.conv, self.rows = conv, rows

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, rows, W] -> [B, C', rows, W]."""
        padded = F.pad(x, (1, 1, 1, 1))
        self.rows.fill_halo(padded, above=True)
        return F.conv2d(padded, self.conv.weight, self.conv.bias)


class _RowPad2d(nn.Module):
    """The padding below and to the right, before a 3x3 convolution of stride 2."""

    def __init__(self, pad: nn.ZeroPad2d, rows: RowShard) -> None:
        super().__init__()
        assert pad.padding == (0, 1, 0, 1), pad
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, rows, W] -> [B, C, rows + 1, W + 1]. A rank's first row is an even one of the picture."""
        padded = F.pad(x, (0, 1, 0, 1))
        self.rows.fill_halo(padded, above=False)
        return padded


class _RowAttention(nn.Module):
    """Attention among all positions of a frame: this rank's queries, every rank's keys and values."""

    def __init__(self, block: nn.Module, rows: RowShard) -> None:
        super().__init__()
        self.block, self.rows = block, rows

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, rows, W] -> the same."""
        images = x.transpose(1, 2).flatten(0, 1)
        qkv = self.block.to_qkv(self.block.norm(images))
        channels = x.shape[1]
        q, kv = qkv[:, :channels], self.rows.gather(qkv[:, channels:])
        # [B * T, C, rows, W] -> one head, [B * T, 1, rows * W, C]
        q, k, v = (y.flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for y in (q, *kv.chunk(2, dim=1)))
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(images.shape)
        return x + self.block.proj(y).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
