"""Matrices of codes with a scale for each block of them, unpacked into floats while they are read.

    format           codes of X.weight            scales                                        block, rows x columns
    nvfp4            e2m1, two in a byte          X.weight_scale e4m3, X.weight_scale_2 fp32    1 x 16
    mxfp8            e4m3                         X.weight_scale e8m0                           1 x 32
    fp8 by blocks    e4m3, e5m2                   X.weight_scale_inv fp32                       128 x 128
    int8 by blocks   int8                         X.weight_scale fp32                           any
    int4 (ConvRot)   int4, two in a byte          X.weight_scale fp32                           1 x all
    w4a8 (ConvRot)   places, two in a byte        X.weight_s_rel e4m3, X.weight_s_channel fp32  1 x 16

The last is `Grouped`, whose values are int8 codes times the scale of their row: ComfyUI's kernels multiply by these
codes (comfy-kitchen, w4a8_int8). The first two follow OCP's Microscaling Formats 1.0; their scales lie in the tiles of
128 x 4 that tensor cores read (cuBLAS, "block scaling factors layout"), and zeros may fill up rows and inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .quant_formats import W4A8
from .stored_tensor import PlainTensor, RowScale, StoredTensor, Unpacked, check_finite, row_pieces

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of three bits; the fourth is the sign."""
TILE = (128, 4)
GROUPED = ("_s_rel", "_s_channel", "_codebook")
"""Behind the name of a w4a8 weight: its groups' scales, its rows', and what its codes are places in."""
USUAL_GROUP = 16
"""Inputs of a w4a8 group where a file does not say how many; of a kernel's load, too."""
PADDED_TO = (16, 32, 128)
"""Rows and inputs of nvfp4 and mxfp8: comfy-kitchen makes them multiples of 16 or 32, others of whole tiles."""


@dataclass(frozen=True, slots=True)
class BlockScaled(Unpacked):
    """values[r, c] = stored[r, c] * scales[r // rows, c // columns] * factor."""

    # What is stored: codes [out, in], or [out, in / 2] of bytes that hold two codes.
    scales: PlainTensor
    block: tuple[int, int]
    tiled: bool
    """The scales lie in tiles."""
    factor: PlainTensor | None = None
    """One number for all."""
    unpadded: tuple[int, int] | None = None
    """Shape of the matrix, where zeros were put behind its rows and inputs."""
    int4: bool = False
    """Two codes in a byte are int4, the first in the low bits; else e2m1, the first in the high bits."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.unpadded or self._stored_shape

    @property
    def _stored_shape(self) -> tuple[int, int]:
        rows, stored = self.stored.shape
        return rows, stored * 2 if self.stored.dtype == torch.uint8 else stored

    def without_padding(self, shape: tuple[int, ...]) -> BlockScaled:
        """What is stored of a matrix of that shape, if it is one with zeros behind it; else as it is."""
        steps = PADDED_TO if self.factor is not None or self.scales.dtype == torch.uint8 else ()
        padded = any(tuple(math.ceil(size / step) * step for size in shape) == self._stored_shape for step in steps)
        return replace(self, unpadded=(shape[0], shape[1])) if padded else self

    def read_into(self, out: Tensor, *, start: int = 0, staging: Tensor | None = None) -> None:
        width, stored = self.shape[1], self.stored.shape[1]
        scales = self._scales().to(out.device)
        for row, piece in row_pieces(out, start, width):
            codes = torch.empty(piece.shape[0], stored, dtype=self.stored.dtype)
            self.stored.read_into(codes, start=row * stored)
            values = _decoded(codes.to(out.device), self.int4)[:, :width]
            blocks = torch.arange(row, row + piece.shape[0], device=out.device) // self.block[0]
            piece.copy_(values.mul_(scales[blocks].repeat_interleave(self.block[1], dim=1)[:, :width]))

    def _scales(self) -> Tensor:
        """[ceil(out / rows), ceil(in / columns)] float32."""
        across = [math.ceil(size / step) for size, step in zip(self._stored_shape, self.block, strict=True)]
        stored = _read(self.scales)
        if self.tiled:
            stored = untile(stored, *across)
        values = _powers_of_two(stored) if stored.dtype == torch.uint8 else stored.float()
        if self.factor is not None:
            values = values * _read(self.factor).view(())
        check_finite(values, self.scales)
        return values.view(across)


@dataclass(frozen=True, slots=True)
class Grouped(Unpacked):
    """int8[r, c] = round(table[stored[r, c]] * groups[r, c // group]); values[r, c] = int8[r, c] * scale[r]."""

    # What is stored: [out, in / 2] of bytes that hold two places in the table, the first in the low bits.
    groups: PlainTensor
    """[out, in / group]."""
    scale: RowScale
    table: PlainTensor | None
    """[16]; None: -8 to 7."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape[0], 2 * self.stored.shape[1]

    def read_into(self, out: Tensor, *, start: int = 0, staging: Tensor | None = None) -> None:
        """int8: the codes alone."""
        width, across, device = self.shape[1], self.groups.shape[1], out.device
        table = torch.arange(-8.0, 8.0) if self.table is None else _read(self.table).float()
        if self.table is not None:
            check_finite(table, self.table)
        for row, piece in row_pieces(out, start, width):
            rows = piece.shape[0]
            packed = torch.empty(rows, width // 2, dtype=self.stored.dtype)
            self.stored.read_into(packed, start=row * width // 2)
            groups = torch.empty(rows, across, dtype=self.groups.dtype)
            self.groups.read_into(groups, start=row * across)
            check_finite(groups.float(), self.groups)
            packed, factors = packed.to(device), groups.to(device).float().unsqueeze(-1)
            places = _low_first(packed).view(rows, across, -1)
            codes = (table.to(device)[places.int()] * factors).round_().clamp_(-127, 127).view(piece.shape)
            piece.copy_(codes if out.dtype == torch.int8 else codes.mul_(self.scale.rows(row, rows).to(device)))


def grouped(name: str, tensors: Mapping[str, StoredTensor], group: int) -> Grouped:
    """A weight of w4a8 from what its file has under `name` and behind that.

    Args:
        group: inputs that share a scale; 0: as is usual.
    Raises:
        ValueError: something is missing, or does not fit the rest.
    """
    group = group or USUAL_GROUP
    codes, groups, rows = (tensors.get(name + end) for end in ("", *GROUPED[:2]))
    table = tensors.get(name + GROUPED[2])
    fits = isinstance(codes, PlainTensor) and len(codes.shape) == 2 and codes.dtype in (torch.int8, torch.uint8)
    if isinstance(groups, PlainTensor) and groups.dtype == torch.uint8:
        groups = replace(groups, dtype=torch.float8_e4m3fn)
    if fits and isinstance(codes, PlainTensor):
        out, width = codes.shape[0], 2 * codes.shape[1]
        if groups is not None and groups.shape == (out, width * 2 // 3 // group):
            # Only the width of a row tells them apart.
            raise ValueError(f"tensor {name} is {W4A8} with codes of 6 bits; this version reads those of 4")
        fits = width % USUAL_GROUP == width % group == 0 and 0 in (USUAL_GROUP % group, group % USUAL_GROUP)
        parts = [(groups, (out, width // group)), (rows, (out,))] + ([] if table is None else [(table, (16,))])
        for part, shape in parts:
            floats = isinstance(part, PlainTensor) and part.dtype.is_floating_point
            fits = fits and floats and part is not None and part.shape == shape
    if not fits or group < 4:
        has = ", ".join(
            f"{name}{end} {'missing' if part is None else list(part.shape)}"
            for end, part in zip(("", *GROUPED), (codes, groups, rows, table), strict=True)
        )
        raise ValueError(f"tensor {name} is said to be {W4A8} with groups of {group} inputs, but it has no such: {has}")
    assert isinstance(codes, PlainTensor) and isinstance(groups, PlainTensor) and isinstance(rows, PlainTensor)
    assert table is None or isinstance(table, PlainTensor)
    return Grouped(replace(codes, dtype=torch.uint8), groups, RowScale(rows, codes.shape[0]), table)


def tiled_size(rows: int, columns: int) -> int:
    """Scales in the tiles that hold [rows, columns] of them."""
    return math.ceil(rows / TILE[0]) * TILE[0] * math.ceil(columns / TILE[1]) * TILE[1]


def untile(stored: Tensor, rows: int, columns: int) -> Tensor:
    """Scales as tensor cores read them -> [rows, columns].

    A tile of 128 rows and 4 columns lies as 32 runs of 16: run i has rows i, i + 32, i + 64, i + 96, four columns each.
    """
    down, across = math.ceil(rows / TILE[0]), math.ceil(columns / TILE[1])
    tiles = stored.reshape(down, across, 32, 4, TILE[1]).permute(0, 3, 2, 1, 4)
    return tiles.reshape(down * TILE[0], across * TILE[1])[:rows, :columns]


def _read(tensor: PlainTensor) -> Tensor:
    values = torch.empty(tensor.shape, dtype=tensor.dtype)
    tensor.read_into(values)
    return values


def _decoded(codes: Tensor, int4: bool) -> Tensor:
    if codes.dtype != torch.uint8:
        return codes.float()
    if int4:
        signed = _low_first(codes).float()
        return signed.sub_((signed >= 8).float(), alpha=16)
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)
    return table[torch.stack((codes >> 4, codes & 15), dim=-1).int()].flatten(1)


def _low_first(packed: Tensor) -> Tensor:
    """[rows, bytes] -> [rows, 2 * bytes], the four low bits of a byte before its four high ones."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


def _powers_of_two(exponents: Tensor) -> Tensor:
    """e8m0 -> float32; 255 is no number."""
    values = torch.ldexp(torch.ones(exponents.shape), exponents.int() - 127)
    return values.masked_fill(exponents == 255, torch.nan)
