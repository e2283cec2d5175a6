"""The layers of Wan's video VAEs over a stream of frames, with the weights of diffusers' modules.

Shapes: T = frames, H = rows, W = columns, C = channels; [T, H, W, C] is contiguous. Rows may be some of a picture's:
what looks at others gets them from `ImageRows`. A causal layer keeps what it needs of the frames before, so that a
stream may come in parts of any length. Whatever precedes a convolution writes straight into the room that it convolves,
with the kept frames and the neighbours' rows around; whatever follows one adds its bias (`vae_ops.Sum`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .vae_ops import Sum, VaeOps

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResample, WanResidualBlock


class ImageRows(Protocol):
    """The rows of a picture that are here, and what the others are asked for."""

    def fill_halo(self, padded: Tensor, *, above: bool) -> None:
        """Puts the rows that border on these into the last row of [T, rows, W, C] and, with `above`, into the first.

        At the picture's edges there is none, and zeros are put.
        """

    def gather(self, local: Tensor, dim: int) -> Tensor:
        """All rows, of a tensor whose dimension `dim` are these."""


class WholePicture:
    """All rows are here."""

    def fill_halo(self, padded: Tensor, *, above: bool) -> None:
        padded[:, -1].zero_()
        if above:
            padded[:, 0].zero_()

    def gather(self, local: Tensor, dim: int) -> Tensor:
        return local


class Tools:
    """What all layers of one coder share."""

    def __init__(self, rows: ImageRows, ops: VaeOps) -> None:
        self.rows, self.ops = rows, ops


class CausalConv:
    """A convolution over time: 3x3x3, or 3x1x1. Its bias is left to what follows."""

    def __init__(self, conv: nn.Conv3d, tools: Tools, *, channels: tuple[int, int] | None = None) -> None:
        """`channels`: in and out, where more are taken and given than the convolution has (zeros)."""
        self.weight, self.bias, self.rows = conv.weight, conv.bias, tools.rows
        if channels is not None:
            self.weight, self.bias = _with_channels(conv, *channels)
        self.stride = conv.stride
        self.halo = conv.kernel_size[1] // 2
        self.back = conv.kernel_size[0] - conv.stride[0]
        """How many frames before the present ones it sees."""
        self._kept: Tensor | None = None

    def room(self, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """For that many new frames: what to call it with, and the part [T, H, W, C] of it to fill before."""
        shape = (self.back + frames, height + 2 * self.halo, width, self.weight.shape[1])
        padded = self.weight.new_empty(shape)
        if self._kept is None:
            padded[: self.back].zero_()
        else:
            padded[: self.back].copy_(self._kept)
        return padded, padded[self.back :, self.halo : self.halo + height]

    def keep(self, frames: Tensor) -> None:
        """As if the last of these [T, H, W, C] had been convolved before. Only without rows around."""
        assert self.halo == 0
        self._keep(frames)

    def _keep(self, frames: Tensor) -> None:
        last = frames[-self.back :]
        if self._kept is None:
            self._kept = last.clone()
        else:
            # Where they lie already: what stays among what comes and goes would cut the memory up.
            self._kept.copy_(last)

    def __call__(self, padded: Tensor) -> Sum:
        if self.halo:
            self.rows.fill_halo(padded[self.back :], above=True)
        self._keep(padded)
        y = F.conv3d(padded[None].permute(0, 4, 1, 2, 3), self.weight, None, self.stride, (0, 0, self.halo))
        return Sum(y.permute(0, 2, 3, 4, 1)[0].contiguous(), self.bias)


class ResidualBlock:
    def __init__(self, block: WanResidualBlock, tools: Tools) -> None:
        self.ops = tools.ops
        self.first, self.second = CausalConv(block.conv1, tools), CausalConv(block.conv2, tools)
        self.norms = [norm.gamma.flatten() for norm in (block.norm1, block.norm2)]
        self.shortcut = None if isinstance(block.conv_shortcut, nn.Identity) else block.conv_shortcut

    def __call__(self, x: Sum) -> Sum:
        padded, inside = self.first.room(*x.x.shape[:3])
        before = self.ops.norm(x, self.norms[0], inside, True, True)
        x = self.first(padded)
        # Each of these is as large as all that is convolved at once.
        del padded, inside
        padded, inside = self.second.room(*x.x.shape[:3])
        self.ops.norm(x, self.norms[1], inside, True, False)
        del x, inside
        if self.shortcut is not None:
            before = pointwise(self.shortcut, before)
        return self.second(padded)._replace(residual=before)


class Attention:
    """Among all positions of a frame: these rows' queries, all rows' keys and values. One head."""

    def __init__(self, block: WanAttentionBlock, tools: Tools) -> None:
        self.rows, self.ops, self.block = tools.rows, tools.ops, block

    def __call__(self, x: Sum) -> Sum:
        normed = torch.empty_like(x.x)
        before = self.ops.norm(x, self.block.norm.gamma.flatten(), normed, False, True)
        channels = before.shape[-1]
        q, kv = pointwise(self.block.to_qkv, normed).split([channels, 2 * channels], dim=-1)
        # [T, H, W, C] -> [T, 1, H * W, C]
        q, k, v = (y.flatten(1, 2).unsqueeze(1) for y in (q, *self.rows.gather(kv, 1).chunk(2, dim=-1)))
        y = F.scaled_dot_product_attention(q, k, v).view(before.shape)
        return Sum(F.linear(y, self.block.proj.weight.flatten(1)), self.block.proj.bias, before)


class Upsample:
    """Twice the rows and columns and, with a convolution over time, two frames of each but the stream's first."""

    def __init__(self, resample: WanResample, tools: Tools) -> None:
        self.rows, self.ops = tools.rows, tools.ops
        self.conv = _conv_of(resample)
        self.time_conv = CausalConv(resample.time_conv, tools) if resample.mode == "upsample3d" else None
        self.started = False

    def __call__(self, x: Sum) -> Sum:
        frames, height, width, channels = x.x.shape
        alone = 0 if self.started else 1
        self.started = True
        of = 1 if self.time_conv is None else 2
        made = frames if of == 1 else alone + 2 * (frames - alone)
        padded = x.x.new_empty(made, 2 * height + 2, 2 * width, channels)
        inside = padded[:, 1:-1]
        if self.time_conv is None:
            self.ops.upsample(x, 1, inside)
        else:
            if alone:
                self.ops.upsample(x.frames(0, 1), 1, inside[:1])
            if frames > alone:
                behind, new = self.time_conv.room(frames - alone, height, width)
                self.ops.add(x.frames(alone, frames), new)
                self.ops.upsample(self.time_conv(behind), 2, inside[alone:])
        self.rows.fill_halo(padded, above=True)
        return Sum(_conv2d(padded, self.conv, padding=(0, 1)), self.conv.bias)


class Downsample:
    """Half the rows and columns and, with a convolution over time, half the frames behind the stream's first.

    The first part is one frame more than an even number, every other one an even number.
    """

    def __init__(self, resample: WanResample, tools: Tools) -> None:
        self.rows, self.ops = tools.rows, tools.ops
        self.conv = _conv_of(resample)
        self.time_conv = CausalConv(resample.time_conv, tools) if resample.mode == "downsample3d" else None
        self.started = False

    def __call__(self, x: Sum) -> Sum:
        frames, height, width, channels = x.x.shape
        # One column on the right and one row below: a rank's first row is an even one of the picture.
        padded = x.x.new_empty(frames, height + 1, width + 1, channels)
        padded[:, :, -1].zero_()
        self.ops.add(x, padded[:, :-1, :-1])
        self.rows.fill_halo(padded, above=False)
        x = Sum(_conv2d(padded, self.conv, padding=(0, 0)), self.conv.bias)
        if self.time_conv is None:
            return x
        alone = 0 if self.started else 1
        self.started = True
        out = []
        if alone:
            out.append(self.ops.add(x.frames(0, 1), None))
            self.time_conv.keep(out[0])
        if len(x.x) > alone:
            behind, new = self.time_conv.room(len(x.x) - alone, *x.x.shape[1:3])
            self.ops.add(x.frames(alone, len(x.x)), new)
            out.append(self.ops.add(self.time_conv(behind), None))
        return Sum(torch.cat(out))


def _conv_of(resample: WanResample) -> nn.Conv2d:
    """The convolution behind what interpolates or pads."""
    _, conv = resample.resample
    assert isinstance(conv, nn.Conv2d), resample
    return conv


def pointwise(conv: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """A 1x1 or 1x1x1 convolution of [T, H, W, C]: a product of rows."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def channels_last(module: nn.Module) -> None:
    """Lays the weights of all convolutions out as the layers here read them."""
    for conv in module.modules():
        if isinstance(conv, (nn.Conv2d, nn.Conv3d)):
            layout = torch.channels_last if conv.weight.dim() == 4 else torch.channels_last_3d
            conv.weight.data = conv.weight.data.contiguous(memory_format=layout)


def _conv2d(padded: Tensor, conv: nn.Conv2d, padding: tuple[int, int]) -> Tensor:
    """[T, H, W, C] -> the same without `conv`'s bias."""
    y = F.conv2d(padded.permute(0, 3, 1, 2), conv.weight, None, conv.stride, padding)
    return y.permute(0, 2, 3, 1).contiguous()


def _with_channels(conv: nn.Conv3d, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """The weight and bias for that many channels, of which those beyond the convolution's are zero."""
    assert conv.bias is not None, conv
    more_in, more_out = inputs - conv.in_channels, outputs - conv.out_channels
    weight = F.pad(conv.weight, (0, 0, 0, 0, 0, 0, 0, more_in, 0, more_out))
    return weight.contiguous(memory_format=torch.channels_last_3d), F.pad(conv.bias, (0, more_out))
