"""What a face does in a picture, as a few numbers: the motion encoder of LIA (Wang et al., 2022, arXiv 2203.09043).

A picture goes through convolutions that halve it seven times (StyleGAN2's discriminator: Karras et al., 2020, arXiv
1912.04958) and a few layers to its coordinates along orthogonal directions of motion. (Wan Animate.) All in float32.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.config import WanConfig

COORDINATES = 20
"""Directions of motion."""
HALVINGS = 7
"""Of 512 rows and columns: 4 are left, which the last convolution makes 1."""
FIRST_WIDTH = 32
"""Channels of the first convolution; each halving doubles them, up to those of a motion."""
BLUR = (1.0, 3.0, 3.0, 1.0)
"""Over rows and over columns, before every second row and column is left out."""
SLOPE = 0.2
BLUR_TENSOR = re.compile(r"motion_encoder\..*\.kernel")
"""Names under which a file holds `BLUR` once more, for each place that it is at."""


class _Bias(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(1, channels, 1, 1))


class _Convolution(nn.Module):
    """Weights of unit size, scaled by the number of their inputs."""

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, size, size))

    def forward(self, x: Tensor, *, halve: bool, pad: int) -> Tensor:
        """x: [F, inputs, h, w]. halve: blurred first, with every second row and column of the result."""
        size = self.weight.shape[-1]
        if halve:
            around = len(BLUR) - 2 + size - 1
            taps = torch.tensor(BLUR, dtype=x.dtype, device=x.device)
            kernel = (torch.outer(taps, taps) / taps.sum() ** 2).expand(x.shape[1], 1, -1, -1)
            x = F.conv2d(F.pad(x, ((around + 1) // 2, around // 2) * 2), kernel, groups=x.shape[1])
        scaled = self.weight * (1 / math.sqrt(self.weight[0].numel()))
        return F.conv2d(x, scaled, stride=2 if halve else 1, padding=pad)


class _Layer(nn.Sequential):
    """A convolution, and behind it a bias with a leaky ReLU if it is `active`. Names count the parts of the original:
    a blur has no weights."""

    def __init__(self, inputs: int, outputs: int, size: int, *, halve: bool = False, active: bool = True) -> None:
        parts = [nn.Identity()] * halve + [_Convolution(inputs, outputs, size)] + [_Bias(outputs)] * active
        super().__init__(*parts)
        self.halve, self.active = halve, active

    def forward(self, x: Tensor) -> Tensor:
        convolution = cast(_Convolution, self[int(self.halve)])
        size = convolution.weight.shape[-1]
        x = convolution(x, halve=self.halve, pad=0 if self.halve else size // 2)
        if not self.active:
            return x
        return F.leaky_relu(x + cast(_Bias, self[-1]).bias, SLOPE) * math.sqrt(2)


class _Halving(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = _Layer(inputs, inputs, 3)
        self.conv2 = _Layer(inputs, outputs, 3, halve=True)
        self.skip = _Layer(inputs, outputs, 1, halve=True, active=False)

    def forward(self, x: Tensor) -> Tensor:
        both: Tensor = self.conv2(self.conv1(x)) + self.skip(x)
        return both / math.sqrt(2)


class _Appearance(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [min(FIRST_WIDTH << i, width) for i in range(HALVINGS + 1)]
        halvings = [_Halving(*pair) for pair in pairwise(widths)]
        self.convs = nn.ModuleList([_Layer(3, widths[0], 1), *halvings, _Convolution(width, width, 4)])

    def forward(self, x: Tensor) -> Tensor:
        """[F, 3, 512, 512] -> [F, width]."""
        *layers, last = self.convs
        for layer in layers:
            x = layer(x)
        ends: Tensor = last(x, halve=False, pad=0)
        return ends[..., 0, 0]


class _Dense(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (1 / math.sqrt(self.weight.shape[1])), self.bias)


class _Encoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net_app = _Appearance(width)
        self.fc = nn.Sequential(*(_Dense(width, width) for _ in range(4)), _Dense(width, COORDINATES))

    def forward(self, x: Tensor) -> Tensor:
        coordinates: Tensor = self.fc(self.net_app(x))
        return coordinates


class _Direction(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, COORDINATES))

    def forward(self, coordinates: Tensor) -> Tensor:
        """[F, 20] -> [F, width]: along what is made orthogonal of the weight's columns."""
        directions = torch.linalg.qr(self.weight + 1e-8 * torch.eye(*self.weight.shape, device=self.weight.device)).Q
        return coordinates @ directions.T


class _Synthesis(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.direction = _Direction(width)


class MotionEncoder(nn.Module):
    """Pictures of a face -> what it does."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.enc = _Encoder(config.motion_dim)
        self.dec = _Synthesis(config.motion_dim)

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures: [F, 3, 512, 512] in -1 to 1 -> [F, motion_dim]."""
        motion: Tensor = self.dec.direction(self.enc(pictures.float()))
        return motion
