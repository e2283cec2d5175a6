"""What `vae.py` compares with: the VAE through diffusers' own modules, split over ranks, and RGB frames for ffmpeg.

This is the pack's way until it had a forward of its own, kept as it was measured then.

Shapes: B = batch, C = channels, T = frames, W = width, rows = image rows of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from wan_pack.distributed.parallel.image_rows import ImageShard
from wan_pack.wan.vae.latents import denormalise, normalise
from wan_pack.wan.video import video
from wan_pack.wan.video.video_formats import CRF


def decode(vae: Any, latents: Tensor, rows: ImageShard | None) -> Iterator[Tensor | None]:
    """As `RankVae.decode`: whole frames [3, n, H, W] on the first rank, None on the others."""
    if rows is None:
        yield from _decode_frames(vae, latents)
        return
    with _split_vae(vae, rows):
        for frames in _decode_frames(vae, rows.split(latents)):
            yield rows.gather_to_first(frames)


def encode(vae: Any, frames: Tensor, rows: ImageShard | None) -> Tensor:
    """As `RankVae.encode`."""
    if rows is None:
        return normalise(vae.encode(frames.to(vae.device, vae.dtype)).latent_dist.mode(), vae.config.z_dim)
    with _split_vae(vae, rows):
        return rows.gather(encode(vae, rows.split(frames), None))


class Writer(video.VideoWriter):
    """Takes frames as bytes of RGB, which ffmpeg converts; `video.PIXELS` must have `frames_to_rgb`."""

    def _command(self) -> list[str]:
        import imageio_ffmpeg

        rate = Fraction(self.fps).limit_denominator(1001)
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "warning", "-nostats"]
        command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{self.width}x{self.height}"]
        command += ["-r", str(rate), "-i", "-", "-an"]
        tags = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
        command += ["-vf", f"scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,{tags}"]
        command += ["-c:v", "libx264", "-crf", str(CRF), "-pix_fmt", "yuv420p", "-movflags", "+faststart"]
        return [*command, "-f", "mp4", str(self._part.absolute())]


def _decode_frames(vae: Any, latents: Tensor) -> Iterator[Tensor]:
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    latents = denormalise(latents, vae.config.z_dim).to(vae.device, vae.dtype)
    vae.clear_cache()
    try:
        latents = vae.post_quant_conv(latents)
        for index in range(latents.shape[2]):
            vae._conv_idx = [0]
            frames = vae.decoder(
                latents[:, :, index : index + 1],
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=index == 0,
            )
            if vae.config.patch_size is not None:
                frames = unpatchify(frames, patch_size=vae.config.patch_size)
            yield frames[0].clamp_(-1.0, 1.0)
    finally:
        vae.clear_cache()


@contextmanager
def _split_vae(vae: Any, rows: ImageShard) -> Iterator[None]:
    """Inside, `vae`'s encoder and decoder work on this rank's rows. Afterwards the VAE is as it was."""
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


def _split_module(module: nn.Module, rows: ImageShard) -> nn.Module | None:
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


def _fill_halo(rows: ImageShard, padded: Tensor, *, above: bool) -> None:
    """Puts the neighbours' adjacent rows into the last row of [..., rows, W] and, with `above`, into the first."""
    send, send_sizes, receive_sizes = [], [0] * rows.world, [0] * rows.world
    row = padded[..., 0, :].numel()
    if rows.rank > 0:
        send.append(padded[..., int(above), :].flatten())
        send_sizes[rows.rank - 1] = row
        receive_sizes[rows.rank - 1] = row * above
    if rows.rank < rows.world - 1:
        if above:
            send.append(padded[..., -2, :].flatten())
        send_sizes[rows.rank + 1] = row * above
        receive_sizes[rows.rank + 1] = row
    received = padded.new_empty(sum(receive_sizes))
    sent = torch.cat(send) if send else padded.new_empty(0)
    dist.all_to_all_single(received, sent, receive_sizes, send_sizes, group=rows.group)
    if above and rows.rank > 0:
        padded[..., 0, :].copy_(received[:row].view(padded[..., 0, :].shape))
    if rows.rank < rows.world - 1:
        padded[..., -1, :].copy_(received[-row:].view(padded[..., -1, :].shape))


class _Split(nn.Module):
    def __init__(self, module: nn.Module, rows: ImageShard) -> None:
        super().__init__()
        self.whole, self.rows = module, rows


class _RowCausalConv3d(_Split):
    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """[B, C, T, rows, W] -> [B, C', T, rows, W]; `cache_x` holds up to two frames."""
        padded = F.pad(x, (1, 1, 1, 1, 2, 0))
        if cache_x is not None:
            padded[:, :, 2 - cache_x.shape[2] : 2, 1:-1, 1:-1] = cache_x
        _fill_halo(self.rows, padded, above=True)
        return F.conv3d(padded, self.whole.weight, self.whole.bias)


class _RowConv2d(_Split):
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, rows, W] -> [B, C', rows, W]."""
        padded = F.pad(x, (1, 1, 1, 1))
        _fill_halo(self.rows, padded, above=True)
        return F.conv2d(padded, self.whole.weight, self.whole.bias)


class _RowPad2d(_Split):
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, rows, W] -> [B, C, rows + 1, W + 1]."""
        padded = F.pad(x, (0, 1, 0, 1))
        _fill_halo(self.rows, padded, above=False)
        return padded


class _RowAttention(_Split):
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, rows, W] -> the same."""
        images = x.transpose(1, 2).flatten(0, 1)
        qkv = self.whole.to_qkv(self.whole.norm(images))
        channels = x.shape[1]
        q, kv = qkv[:, :channels], self.rows.gather(qkv[:, channels:])
        # [B * T, C, rows, W] -> one head, [B * T, 1, rows * W, C]
        q, k, v = (y.flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for y in (q, *kv.chunk(2, dim=1)))
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(images.shape)
        return x + self.whole.proj(y).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
