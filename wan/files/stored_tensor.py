"""Tensors where they lie in a file, read range by range into the tensor that keeps them.

Bytes are read with `pread` (or into a small staging buffer when the dtype or device differs): a memory map would leave
every page it touched in the process.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..model.eight_bits import CODES
from .gguf_files import GgufFile
from .regular_files import read_range, regular

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
}
"""safetensors' name of a dtype -> torch's, of those that can be read as numbers."""
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
"""The same of whole numbers, which some write where a number is whole."""
STAGING_BYTES = 32 << 20
"""Of the buffer through which bytes of another dtype, or for another device, go."""
FLOAT_PIECE = 1 << 22
"""Elements that exist in float32 at once while a quantised tensor is unpacked."""


class StoredTensor(Protocol):
    """One tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype:
        """In which no value is rounded, and nothing is cast on the way."""

    def read_into(self, out: Tensor, *, start: int = 0, staging: Tensor | None = None) -> None:
        """Reads the values of the elements from flat index `start` on, until `out` is full.

        Args:
            out: contiguous, any device and float dtype; values are cast. Of the file's own fp8 dtype, or int8: the
                codes, to which a scale, and a rotation, is still to be applied.
            staging: uint8 buffer on the CPU, page-locked for a copy to a GPU; needed unless `out` is on the CPU with
                the file's own dtype.
        Raises:
            OSError: the file ended early or cannot be read.
            ValueError: a scale is not a finite number.
        """


@dataclass(frozen=True, slots=True)
class PlainTensor:
    """Elements of one dtype, one after the other; the values are these times `scale`."""

    path: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Absolute offset of the first byte in the file."""
    scale: RowScale | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read_into(self, out: Tensor, *, start: int = 0, staging: Tensor | None = None) -> None:
        flat = out.view(-1)
        codes = out.dtype == self.dtype and out.dtype in CODES
        scale = None if codes else self.scale
        with open(self.path, "rb", buffering=0, opener=regular) as file:
            if flat.device.type == "cpu" and flat.dtype == self.dtype and scale is None:
                self._pread(file.fileno(), flat.view(torch.uint8), start)
                return
            assert staging is not None, "casting or copying to a device needs a staging buffer"
            row = math.prod(self.shape[1:])
            per_read = staging.numel() // self.dtype.itemsize
            if scale is not None:
                assert start % row == 0 and row <= per_read, "scaled tensors are read in whole rows"
                per_read = max(min(per_read, FLOAT_PIECE) // row, 1) * row
            for begin, piece in _pieces(flat, per_read):
                raw = staging[: piece.numel() * self.dtype.itemsize]
                self._pread(file.fileno(), raw, start + begin)
                # Cast where the parameter is: a GPU does it in no time, a CPU at a few GB/s.
                values = raw.view(self.dtype).to(piece.device, non_blocking=True)
                if scale is not None:
                    factors = scale.rows((start + begin) // row, piece.numel() // row).to(piece.device)
                    values = values.float().view(-1, row).mul_(factors).view(-1)
                piece.copy_(values)
                if piece.device.type == "cuda":
                    # The next read overwrites the buffer that this copy reads from.
                    torch.cuda.current_stream(piece.device).synchronize()

    def _pread(self, fd: int, out: Tensor, start: int) -> None:
        """Fills `out` (uint8, CPU) from element `start` on."""
        offset = self.offset + start * self.dtype.itemsize
        # Not out.numpy(): torch would never again let that storage be resized, which offloading does.
        view = memoryview((ctypes.c_ubyte * out.numel()).from_address(out.data_ptr())).cast("B")
        read_range(fd, view, offset, self.path)


@dataclass(frozen=True, slots=True)
class StridedTensor:
    """A tensor whose elements do not lie one after the other, as a .pth may keep it; read as a whole."""

    span: PlainTensor
    """[n], from its first element to its last."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.span.dtype

    def read_into(self, out: Tensor, *, start: int = 0, staging: Tensor | None = None) -> None:
        span = torch.empty(self.span.shape, dtype=self.span.dtype)
        self.span.read_into(span)
        values = span.as_strided(self.shape, self.strides).reshape(-1)
        out.view(-1).copy_(values[start : start + out.numel()])


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A tensor that is made of another one while it is read, in float32."""

    stored: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32


@dataclass(frozen=True, slots=True)
class RowScale(Unpacked):
    """What each row of a quantised weight is multiplied by, from one number for all rows or one per row."""

    stored: PlainTensor
    num_rows: int

    @property
    def shape(self) -> tuple[int, int]:
        return (self.num_rows, 1)

    def rows(self, first: int, count: int) -> Tensor:
        """[count, 1] float32."""
        one_for_all = math.prod(self.stored.shape) == 1
        values = torch.empty(1 if one_for_all else count, dtype=self.stored.dtype)
        self.stored.read_into(values, start=0 if one_for_all else first)
        check_finite(values, self.stored)
        return values.float().view(-1, 1).expand(count, 1)

    def read_into(self, out: Tensor, *, start: int = 0, staging: Tensor | None = None) -> None:
        out.view(-1, 1).copy_(self.rows(start, out.numel()))


@dataclass(frozen=True, slots=True)
class ScaledTensor(Unpacked):
    """Codes times one number, or one for each row; read from any element on."""

    scale: RowScale

    def read_into(self, out: Tensor, *, start: int = 0, staging: Tensor | None = None) -> None:
        width = max(math.prod(self.shape[1:]), 1)
        for begin, piece in _pieces(out.view(-1), FLOAT_PIECE):
            codes = torch.empty(piece.shape, dtype=self.stored.dtype)
            self.stored.read_into(codes, start=start + begin)
            first, last = (start + begin) // width, (start + begin + piece.numel() - 1) // width
            rows = torch.arange(start + begin, start + begin + piece.numel()) // width - first
            piece.copy_(codes.float() * self.scale.rows(first, last - first + 1).view(-1)[rows])


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A tensor of a GGUF file; unpacked on the CPU while it is read."""

    file: GgufFile
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.tensors[self.name].shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def read_into(self, out: Tensor, *, start: int = 0, staging: Tensor | None = None) -> None:
        for begin, piece in _pieces(out.view(-1), FLOAT_PIECE):
            piece.copy_(self.file.read_flat(self.name, start + begin, piece.numel()))


@dataclass(frozen=True, slots=True)
class Joined:
    """Tensors one behind the other, read as one."""

    parts: tuple[StoredTensor, ...]
    shape: tuple[int, ...]
    """With as many elements as all of them."""

    @property
    def dtype(self) -> torch.dtype:
        kinds = {part.dtype for part in self.parts}
        return kinds.pop() if len(kinds) == 1 else torch.float64

    def read_into(self, out: Tensor, *, start: int = 0, staging: Tensor | None = None) -> None:
        begin = -start
        for part in self.parts:
            begin = read_from(part, out.view(-1), begin, staging)


def read_from(part: StoredTensor, flat: Tensor, begin: int, staging: Tensor | None) -> int:
    """Reads what of `part` lies in `flat`, where it begins at an index that may be below 0. Returns where it ends."""
    end = begin + math.prod(part.shape)
    piece = flat[max(begin, 0) : max(end, 0)]
    if piece.numel():
        part.read_into(piece, start=max(-begin, 0), staging=staging)
    return end


def is_scale(tensor: StoredTensor) -> bool:
    """Whether it belongs to a weight's codes."""
    return isinstance(tensor.parts[0] if isinstance(tensor, Joined) else tensor, RowScale)


def check_finite(scales: Tensor, source: PlainTensor) -> None:
    """Raises ValueError naming the file that they were read from."""
    if not scales.isfinite().all():
        raise ValueError(f"{source.path} is damaged: a weight's scale is not a finite number")


def _pieces(flat: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """(first index, part) of a flat tensor, in parts of at most `size` elements."""
    for begin in range(0, flat.numel(), size):
        yield begin, flat[begin : begin + size]


def row_pieces(out: Tensor, start: int, width: int) -> Iterator[tuple[int, Tensor]]:
    """(row of the whole matrix, rows [n, width]) of what is to be filled from flat index `start` of a matrix on, few
    enough to exist in float32."""
    assert start % width == 0 and out.numel() % width == 0, "such tensors are read in whole rows"
    for begin, piece in _pieces(out.view(-1), max(FLOAT_PIECE // width, 1) * width):
        yield (start + begin) // width, piece.view(-1, width)
