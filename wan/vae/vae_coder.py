"""The encoder and decoder of Wan's video VAEs, with diffusers' weights and result, in parts that fit the memory.

Shapes: z = latent channels, T = latent frames, F = frames, rows = those of the picture that are here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..model.latent_space import FRAMES_AT_ONCE, TEMPORAL_STRIDE
from .vae_input import FrameParts
from .vae_layers import Attention, CausalConv, Downsample, ResidualBlock, Tools, Upsample, pointwise
from .vae_ops import Sum

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import (
        AutoencoderKLWan,
        WanDecoder3d,
        WanEncoder3d,
        WanResample,
    )

ALIGNMENT = 8
"""Channels that convolutions take and give are a multiple of this: 16 bytes, as the fast ones need."""


class Stage:
    """What works at one resolution: blocks, then the step to the next."""

    def __init__(
        self, blocks: Sequence[nn.Module], resample: WanResample | None, tools: Tools, shortcut: nn.Module | None = None
    ) -> None:
        """`shortcut`: the Wan2.2 VAE's way around the stage (diffusers' DupUp3D or AvgDown3D), without weights."""
        self.blocks = [_BLOCKS[type(block).__name__](block, tools) for block in blocks]
        self.shortcut, self.ops = shortcut, tools.ops
        self.resample: Upsample | Downsample | None = None
        if resample is not None:
            self.resample = (Upsample if resample.mode.startswith("up") else Downsample)(resample, tools)
        self.up = isinstance(self.resample, Upsample)
        tensors = 4
        if isinstance(self.resample, Upsample):
            # Input, then what the convolution reads, four or eight times as much, and what it gives, half of that.
            tensors = 8 if self.resample.time_conv is None else 16
        widest = max(conv.out_channels for block in blocks for conv in block.modules() if isinstance(conv, nn.Conv3d))
        self._elements = tensors * widest
        self._started = False

    def elements(self, positions: int, frames: int = 1) -> int:
        """What is in use at once while so many frames of so many positions go through."""
        return frames * positions * self._elements

    def frames(self, positions: int, most: int) -> int:
        """How many go through at once with at most so many elements in use; one may take more."""
        return max(most // self.elements(positions), 1)

    def __call__(self, x: Sum) -> Sum:
        around = None
        if self.shortcut is not None:
            x = Sum(self.ops.add(x, None))
            around = self._around(self.shortcut, x.x)
        for block in self.blocks:
            x = block(x)
        if self.resample is not None:
            x = self.resample(x)
        if around is None:
            return x
        # Both are the largest that there is. Where the stage's result lies, as nobody else has it: two of them would
        # wait while all that follows works on parts of them.
        made = self.ops.add(x, x.x)
        return Sum(self.ops.add(Sum(made, None, around), made))

    def _around(self, shortcut: nn.Module, x: Tensor) -> Tensor:
        first = {"first_chunk": not self._started} if self.up else {}
        self._started = True
        y = shortcut(x[None].permute(0, 4, 1, 2, 3), **first)
        return y.permute(0, 2, 3, 4, 1)[0].contiguous()


class Decoder:
    """For one video: it keeps what later frames need."""

    def __init__(self, vae: AutoencoderKLWan, tools: Tools) -> None:
        decoder = vae.decoder
        self.before = vae.post_quant_conv
        self.conv_in = CausalConv(decoder.conv_in, tools)
        self.stages = [Stage(_middle(decoder), None, tools)]
        block: Any
        for block in decoder.up_blocks:
            # The Wan2.2 VAE's blocks name their parts otherwise.
            resample = block.upsamplers[0] if getattr(block, "upsamplers", None) else getattr(block, "upsampler", None)
            self.stages.append(Stage(block.resnets, resample, tools, getattr(block, "avg_shortcut", None)))
        self.head = _Head(decoder, tools)

    def frames(self, latents: Tensor, at_once: int) -> Iterator[Tensor]:
        """[1, z, T, rows, w] -> parts [1, C, n, rows, W] of the video, of n up to `at_once`."""
        x = pointwise(self.before, _channels_last(latents))
        positions, doublings = _positions(x), sum(stage.up for stage in self.stages)
        most = self.stages[-1].elements(positions, at_once * 4**doublings)
        # The first stage's result waits while the second, which works on as many positions and more, takes its parts.
        entering = min(stage.frames(positions, most) for stage in self.stages[:2])
        for part in Sum(x).split(entering):
            yield from self._through(self._entered(part.x), self.stages, most)

    def _entered(self, x: Tensor) -> Sum:
        padded, inside = self.conv_in.room(*x.shape[:3])
        inside.copy_(x)
        return self.conv_in(padded)

    def _through(self, x: Sum, stages: list[Stage], most: int) -> Iterator[Tensor]:
        """What is left to do for these frames; each part goes all the way before the next one begins."""
        if not stages:
            yield self.head(x)
            return
        stage, *others = stages
        for part in x.split(stage.frames(_positions(x.x), most)):
            yield from self._through(stage(part), others, most)


class Encoder:
    """For one video: it keeps what later frames need."""

    def __init__(self, vae: AutoencoderKLWan, tools: Tools) -> None:
        encoder = vae.encoder
        self.after = vae.quant_conv
        self.channels = -(-encoder.conv_in.in_channels // ALIGNMENT) * ALIGNMENT
        self.conv_in = CausalConv(encoder.conv_in, tools, channels=(self.channels, encoder.conv_in.out_channels))
        self.stages = [Stage(blocks, resample, tools, shortcut) for blocks, resample, shortcut in _down_stages(encoder)]
        self.stages.append(Stage(_middle(encoder), None, tools))
        self.head = _Head(encoder, tools)

    def moments(self, video: FrameParts) -> Tensor:
        """[1, C, F, rows, W] -> [1, 2z, T, rows, w]: means, then logarithms of variances."""
        frames, rows, columns = video.shape
        # What lasts is at full resolution; what halves the frames needs an even number of them.
        step = max(FRAMES_AT_ONCE // TEMPORAL_STRIDE, 1) * TEMPORAL_STRIDE
        bounds = [0, *range(1 + step, frames, step), frames]
        halved = Sum.joined(self._halved(video.read(start, end)) for start, end in pairwise(bounds))
        most = self.stages[0].elements(rows * columns, FRAMES_AT_ONCE)
        # With the others goes what they kept of the last frames, at full resolution.
        self.stages = self.stages[-2:]
        out = []
        for part in halved.split(self.stages[0].frames(_positions(halved.x), most)):
            for stage in self.stages:
                part = stage(part)
            out.append(pointwise(self.after, _channels_last(self.head(part))))
        return torch.cat(out).permute(3, 0, 1, 2)[None]

    def _halved(self, video: Tensor) -> Sum:
        """Through all stages that take frames or positions together."""
        padded, inside = self.conv_in.room(*video.shape[2:])
        inside[..., video.shape[1] :].zero_()
        inside[..., : video.shape[1]].copy_(_channels_last(video))
        x = self.conv_in(padded)
        for stage in self.stages[:-2]:
            x = stage(x)
        return x


class _Head:
    """What ends both: a norm and a convolution to a few channels."""

    def __init__(self, coder: WanEncoder3d | WanDecoder3d, tools: Tools) -> None:
        conv = coder.conv_out
        self.ops, self.weight, self.channels = tools.ops, coder.norm_out.gamma.flatten(), conv.out_channels
        aligned = -(-self.channels // ALIGNMENT) * ALIGNMENT
        self.conv = CausalConv(conv, tools, channels=(conv.in_channels, aligned))

    def __call__(self, x: Sum) -> Tensor:
        """[n, rows, W, C] -> [1, C', n, rows, W]."""
        padded, inside = self.conv.room(*x.x.shape[:3])
        self.ops.norm(x, self.weight, inside, True, False)
        y, bias, _ = self.conv(padded)
        assert bias is not None, "diffusers' convolutions have one"
        return (y[..., : self.channels] + bias[: self.channels]).permute(3, 0, 1, 2)[None]


_BLOCKS: dict[str, Callable[[Any, Tools], Callable[[Sum], Sum]]] = {
    "WanResidualBlock": ResidualBlock,
    "WanAttentionBlock": Attention,
}


def _middle(coder: WanEncoder3d | WanDecoder3d) -> list[nn.Module]:
    """diffusers' middle block in order."""
    first, *others = coder.mid_block.resnets
    return [first, *(part for pair in zip(coder.mid_block.attentions, others, strict=True) for part in pair)]


def _down_stages(encoder: WanEncoder3d) -> list[tuple[list[nn.Module], WanResample | None, nn.Module | None]]:
    """Blocks, resampling and shortcut of each stage."""
    stages: list[tuple[list[nn.Module], WanResample | None, nn.Module | None]] = []
    blocks: list[nn.Module] = []
    block: Any
    for block in encoder.down_blocks:
        if type(block).__name__ == "WanResidualDownBlock":
            stages.append((list(block.resnets), block.downsampler, block.avg_shortcut))
        elif type(block).__name__ == "WanResample":
            stages.append((blocks, block, None))
            blocks = []
        else:
            blocks.append(block)
    return [*stages, (blocks, None, None)] if blocks else stages


def _positions(x: Tensor) -> int:
    """Of a frame of [T, H, W, C]."""
    return x.shape[1] * x.shape[2]


def _channels_last(x: Tensor) -> Tensor:
    """[1, C, T, H, W] -> [T, H, W, C]."""
    return x[0].permute(1, 2, 3, 0)
