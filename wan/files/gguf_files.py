"""GGUF files: the header, and tensors unpacked to float32 row by row.

The header is parsed here (the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), with every size
checked against the file before it is used. The optional package `gguf` knows the quantised types and unpacks them.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .headers import MAX_HEADER_BYTES, MAX_TENSORS, brief, check_count, check_name, describe_file
from .regular_files import read_range, regular

MAX_VALUES = MAX_TENSORS + 1024
"""Of metadata: a converter may note each tensor's shape there."""
MAX_ITEMS = 1 << 19
"""Of one array, and strings of all arrays together. umT5's vocabulary has 256,384."""
MAX_DIMS = 8
SMALL = 64
"""Elements of an array that is kept with the metadata."""
PIECE = 1 << 17
"""Elements unpacked at once: more would leave the processor's cache, which halves the speed."""

Value = bool | int | float | str | list[Any]

_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""Metadata value type -> struct format."""
_STRING, _ARRAY = 8, 9
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""What ComfyUI-GGUF's converter notes of a tensor that it reshaped to fit the blocks of a quantised type."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor in a GGUF file."""

    shape: tuple[int, ...]
    """As torch has it: slowest first."""
    type_name: str
    """"F32", "BF16", "Q4_K", ..."""
    offset: int
    """Absolute offset of the first byte in the file."""
    nbytes: int
    block: tuple[int, int]
    """Elements and bytes of one block, the unit that is unpacked."""


@dataclass(frozen=True, slots=True)
class GgufArray:
    """A metadata array that is too long to keep."""

    type_id: int
    count: int
    offset: int
    """Absolute offset of the first element in the file."""


class GgufFile:
    """An opened GGUF file: metadata, tensors and where their bytes are. Holds no file open.

    Raises:
        ValueError: the file cannot be read, is truncated, damaged, of another format or of a type that cannot be
            unpacked, or the package `gguf` is not installed; the message names the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.metadata: dict[str, Value] = {}
        """Numbers, strings and short arrays."""
        self.arrays: dict[str, GgufArray] = {}
        """Long arrays: see `read_array`."""
        self.tensors: dict[str, GgufTensor] = {}
        self.header_bytes = 0
        self._sizes = _block_sizes(self.path)
        try:
            with open(path, "rb", opener=regular) as file:
                if file.read(4) != b"GGUF":
                    raise ValueError(f"{path} is not a GGUF file: it is {describe_file(path)}")
                try:
                    self._parse(_Header(file))
                except ValueError as error:
                    raise ValueError(f"{path} is a damaged or truncated GGUF file: {brief(error)}") from error
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
        self._check_unpackable()

    def read_array(self, key: str) -> list[Any]:
        """A metadata array of any length."""
        if isinstance(known := self.metadata.get(key), list):
            return list(known)
        array = self.arrays[key]
        with open(self.path, "rb", opener=regular) as file:
            header = _Header(file)
            header.skip_to(array.offset)
            return header.values(array.type_id, array.count)

    def read_rows(self, name: str, first_row: int, count: int) -> Tensor:
        """Rows [first_row, first_row + count) of a tensor along its first dimension, float32.

        Raises:
            OSError: the file ended early or cannot be read.
        """
        shape = self.tensors[name].shape
        row = math.prod(shape[1:])
        return self.read_flat(name, first_row * row, count * row).view(count, *shape[1:])

    def read_flat(self, name: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of a flattened tensor, float32. Raises OSError as `read_rows`."""
        import gguf
        import numpy as np

        tensor = self.tensors[name]
        elements, size = tensor.block
        kind = gguf.GGMLQuantizationType[tensor.type_name]
        out = np.empty(count, dtype=np.float32)
        first, last = start // elements, -(-(start + count) // elements)
        step = max(PIECE // elements, 1)
        with open(self.path, "rb", buffering=0, opener=regular) as file:
            for block in range(first, last, step):
                data = np.empty((min(block + step, last) - block) * size, dtype=np.uint8)
                read_range(file.fileno(), data.data, tensor.offset + block * size, self.path)
                values = gguf.quants.dequantize(data[None], kind)
                # A range may start and end inside a block: shards are cut by rows, blocks need not be.
                begin = block * elements - start
                skip = max(-begin, 0)
                piece = out[begin + skip : begin + values.size]
                piece[:] = values.reshape(-1)[skip : skip + piece.size]
        return torch.from_numpy(out)

    def _parse(self, header: _Header) -> None:
        (version,) = header.numbers("I")
        if version not in (2, 3):
            raise ValueError(f"it has version {version}; versions 2 and 3, little-endian, can be read")
        num_tensors, num_values = header.numbers("QQ")
        check_count(num_tensors)
        if num_values > MAX_VALUES:
            raise ValueError(f"it promises {num_values} values; at most {MAX_VALUES} are allowed")
        for _ in range(num_values):
            key = check_name(header.string())
            if key in self.metadata or key in self.arrays:
                raise ValueError(f"it names {key!r} twice")
            (type_id,) = header.numbers("I")
            if type_id != _ARRAY:
                (self.metadata[key],) = header.values(type_id, 1)
                continue
            item_type, count = header.numbers("IQ")
            if count <= SMALL:
                self.metadata[key] = header.values(item_type, count)
            else:
                self.arrays[key] = GgufArray(item_type, count, header.position)
                header.skip(item_type, count)
        entries = [self._tensor_entry(header) for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
            raise ValueError(f"general.alignment is {brief(alignment)}; it must be a number up to 1048576")
        self.header_bytes = header.position
        data_start = -(-header.position // alignment) * alignment
        for name, type_id, shape, offset in entries:
            self._add_tensor(name, type_id, shape, data_start + offset, header.file_size)
        self._check_apart()

    def _tensor_entry(self, header: _Header) -> tuple[str, int, tuple[int, ...], int]:
        name = check_name(header.string())
        (num_dims,) = header.numbers("I")
        if num_dims > MAX_DIMS:
            raise ValueError(f"tensor {name!r} has {num_dims} dimensions; at most {MAX_DIMS}")
        shape = tuple(reversed(header.numbers("Q" * num_dims)))
        type_id, offset = header.numbers("IQ")
        if type_id not in self._sizes:
            raise ValueError(f"tensor {name!r} has type {type_id}, which the installed package gguf does not know")
        return name, type_id, shape, offset

    def _add_tensor(self, name: str, type_id: int, shape: tuple[int, ...], offset: int, file_size: int) -> None:
        if name in self.tensors:
            raise ValueError(f"it names tensor {name!r} twice")
        type_name, block = self._sizes[type_id]
        if 0 in shape or (shape[-1] if shape else 1) % block[0]:
            raise ValueError(f"tensor {name!r} has shape {shape}; {type_name} has blocks of {block[0]} elements")
        count = math.prod(shape)
        nbytes = count // block[0] * block[1]
        if offset + nbytes > file_size:
            raise ValueError(f"tensor {name!r} ends at byte {offset + nbytes}; the file has {file_size}")
        original = self.metadata.get(_ORIGINAL_SHAPE + name)
        if original is not None:
            if not isinstance(original, list) or not all(type(size) is int and size > 0 for size in original):
                raise ValueError(f"{_ORIGINAL_SHAPE}{name} is {brief(original)}; it must be a list of sizes")
            if math.prod(original) != count:
                raise ValueError(f"{_ORIGINAL_SHAPE}{name} is {original}; the tensor has {count} elements")
            shape = tuple(original)
        self.tensors[name] = GgufTensor(shape, type_name, offset, nbytes, block)

    def _check_apart(self) -> None:
        end, last = 0, ""
        for name, tensor in sorted(self.tensors.items(), key=lambda item: item[1].offset):
            if tensor.offset < end:
                raise ValueError(f"tensor {name!r} starts at byte {tensor.offset}, inside tensor {last!r}")
            end, last = tensor.offset + tensor.nbytes, name

    def _check_unpackable(self) -> None:
        import gguf
        import numpy as np

        for type_name, (_, size) in dict.fromkeys((tensor.type_name, tensor.block) for tensor in self.tensors.values()):
            try:
                gguf.quants.dequantize(np.zeros((1, size), dtype=np.uint8), gguf.GGMLQuantizationType[type_name])
            except NotImplementedError as error:
                raise ValueError(
                    f"{self.path} holds tensors of type {type_name}, which the package gguf cannot unpack; "
                    "choose a file of another type, such as Q8_0 or Q4_K_M"
                ) from error


class _Header:
    """Reads values in order, never more than the file or a header has. Raises ValueError or OSError."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.file_size = os.fstat(file.fileno()).st_size
        self.position = file.tell()
        self._end = min(self.file_size, MAX_HEADER_BYTES)
        self._strings = 0

    def skip_to(self, position: int) -> None:
        self._file.seek(position)
        self.position = position

    def take(self, size: int) -> bytes:
        if size > self._end - self.position:
            limit = "the file" if self._end == self.file_size else f"a header's limit of {MAX_HEADER_BYTES} bytes"
            raise ValueError(f"its header needs {size} bytes at byte {self.position}, beyond {limit}")
        data = self._file.read(size)
        if len(data) < size:
            raise ValueError(f"it ended at byte {self.position + len(data)} while it was read")
        self.position += size
        return data

    def numbers(self, formats: str) -> tuple[Any, ...]:
        return struct.unpack("<" + formats, self.take(struct.calcsize("<" + formats)))

    def string(self) -> str:
        (length,) = self.numbers("Q")
        return self.take(length).decode("utf-8")

    def values(self, type_id: int, count: int) -> list[Any]:
        """`count` values of one type."""
        self._check(type_id, count)
        if type_id == _STRING:
            return [self.string() for _ in range(count)]
        size = struct.calcsize("<" + _NUMBERS[type_id])
        return list(struct.unpack(f"<{count}{_NUMBERS[type_id]}", self.take(count * size)))

    def skip(self, type_id: int, count: int) -> None:
        """Steps over `count` values of one type."""
        self._check(type_id, count)
        if type_id == _STRING:
            for _ in range(count):
                self.take(*self.numbers("Q"))
        else:
            self.take(count * struct.calcsize("<" + _NUMBERS[type_id]))

    def _check(self, type_id: int, count: int) -> None:
        if type_id != _STRING and type_id not in _NUMBERS:
            raise ValueError(f"it holds a value of type {type_id}, which is no number, string or list of them")
        if count > MAX_ITEMS:
            raise ValueError(f"it holds a list of {count} values; at most {MAX_ITEMS} are allowed")
        self._strings += count if type_id == _STRING else 0
        if self._strings > MAX_ITEMS:
            raise ValueError(f"its lists hold over {MAX_ITEMS} strings")


def _block_sizes(path: str) -> dict[int, tuple[str, tuple[int, int]]]:
    """Tensor type -> its name, and the elements and bytes of its blocks."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"{path} is a GGUF file, which needs the package gguf: pip install gguf") from error
    return {int(kind): (kind.name, sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
