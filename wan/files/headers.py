"""Safetensors headers and what else a model file may turn out to be."""

from __future__ import annotations

import math
import os
import reprlib
import struct
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .json_text import parse_json
from .regular_files import regular

MAX_HEADER_BYTES = 16 << 20
"""Of one file, and of all files of a model together. 14B's takes 0.2 MB, a trainer's notes in a LoRA a few MB, umT5's
vocabulary in a GGUF 7 MB."""
MAX_TENSORS = 16_384
"""Of one file, and of all files of a model together. 14B has 1,095, with the scales of 4-bit weights some 5,000."""
MAX_PARTS = 12 * MAX_TENSORS
"""Of JSON. A tensor of five dimensions takes eleven."""
FORMAT_MAX_BYTES = 100_000_000
"""The format's own limit: more is another format."""
MAX_NAME_LENGTH = 500
MAX_DIMS = 64
"""torch's own limit."""
MAX_QUOTE = 400
"""Characters that a message quotes from a file."""

_REPR = reprlib.Repr()
_REPR.maxstring = 200
"""Long enough for the names of files and tensors."""

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor in a file."""

    dtype: str
    """As safetensors or GGUF names it: "F32", "BF16", "F8_E4M3", "Q4_K", ..."""
    shape: tuple[int, ...]
    start: int
    """Absolute offset of the first byte in the file."""
    end: int
    """Absolute offset behind the last byte."""
    strides: tuple[int, ...] | None = None
    """Elements from one to the next of each dimension, where they do not lie one after the other (.pth)."""


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """What a safetensors file says it holds; checked against its size."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    nbytes: int
    """Of the header itself."""


def read_header(path: str | Path, opened: BinaryIO | None = None) -> SafetensorsHeader:
    """Reads and checks a safetensors header: types, sizes, no gap or overlap, nothing outside the file.

    Args:
        opened: the file, where it is open.
    Raises:
        ValueError: the file cannot be read, is truncated or damaged, or is something else; the message names the
            file and what it is.
    """
    path = Path(path)
    try:
        with nullcontext(opened) if opened is not None else open(path, "rb", opener=regular) as file:
            file_size = os.fstat(file.fileno()).st_size
            text, data_start = _header_text(path, file, file_size)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        # An object: its first bracket has been looked at.
        entries = parse_json(text, MAX_PARTS)
        metadata = _metadata(entries.pop("__metadata__", {}))
        check_count(len(entries))
        tensors = {name: _tensor_info(name, entry, data_start) for name, entry in entries.items()}
        end = _check_contiguous(tensors, data_start)
    except ValueError as error:
        raise ValueError(f"{path} has a damaged safetensors header: {brief(error)}") from error
    if end > file_size:
        raise ValueError(f"{path} is truncated: its header promises {end} bytes, the file has {file_size}")
    if end < file_size:
        raise ValueError(f"{path} is damaged: its header promises {end} bytes, the file has {file_size}")
    return SafetensorsHeader(tensors, metadata, len(text))


def describe_file(path: str | Path) -> str:
    """Names a file by its first bytes: "a git-lfs pointer (...)", "a GGUF file", "a zip archive (...)", ..."""
    try:
        if Path(path).is_dir():
            return "a folder"
        with open(path, "rb", opener=regular) as file:
            start = file.read(512)
    except OSError as error:
        return f"unreadable ({error.strerror or error})"
    text = start.lstrip().lower()
    if not start:
        return "an empty file"
    if text.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer (the file itself was never downloaded: run 'git lfs pull')"
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "a web page (the download saved an error or login page)"
    if start.startswith(b"PK\x03\x04"):
        return "a zip archive (a PyTorch checkpoint, .pth or .pt, is one)"
    if start.startswith(b"GGUF"):
        return "a GGUF file"
    if start[:1] == b"\x80" and b"\x02" <= start[1:2] <= b"\x05":
        return "a Python pickle"
    if text.startswith((b"{", b"[")):
        return "a JSON file"
    if start.count(0) == len(start):
        return "a file of zero bytes (an unfinished download)"
    if len(start) > 8 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] <= FORMAT_MAX_BYTES:
        return "a safetensors file"
    return "of an unknown format"


class HeadersTogether:
    """What the headers of one model's files come to: many small ones cost as much as a large one."""

    def __init__(self) -> None:
        self._bytes = self._tensors = 0

    def add(self, path: str | Path, nbytes: int, tensors: int) -> None:
        """ValueError, naming the file, if it is one too many."""
        self._bytes += nbytes
        self._tensors += tensors
        if self._bytes > MAX_HEADER_BYTES or self._tensors > MAX_TENSORS:
            raise ValueError(
                f"{path} and the files before it have headers of {self._bytes} bytes with {self._tensors} tensors; "
                f"at most {MAX_HEADER_BYTES} bytes and {MAX_TENSORS} tensors are allowed for one model"
            )


def check_count(tensors: int) -> None:
    """ValueError if one file describes too many tensors."""
    if tensors > MAX_TENSORS:
        raise ValueError(f"it describes {tensors} tensors; at most {MAX_TENSORS} are allowed")


def check_name(name: str) -> str:
    """The name of a tensor, if it can be one. Raises ValueError for a name that no message or log could show."""
    if len(name) > MAX_NAME_LENGTH:
        raise ValueError(f"it has a tensor name of {len(name)} characters; at most {MAX_NAME_LENGTH} are allowed")
    if not name.isprintable():
        raise ValueError(f"it has the tensor name {name!a}, which holds characters that cannot be shown")
    return name


def check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...], label: str) -> None:
    """Raises ValueError, naming both, if a tensor has another shape than the sizes of the others call for."""
    if found != expected:
        raise ValueError(
            f"{label}: tensor {name} has shape {list(found)}; the sizes of its other tensors call for {list(expected)}"
        )


def brief(value: object) -> str:
    """A value from a file, for a message: short and printable, whatever the file holds."""
    try:
        text = str(value) if isinstance(value, Exception) else _REPR.repr(value)
    except ValueError:
        # Python writes no integer of more than 4300 digits.
        text = f"{type(value).__name__} with a number of thousands of digits"
    text = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text[:MAX_QUOTE])
    return text if len(text) < MAX_QUOTE else f"{text[:MAX_QUOTE]}..."


def _header_text(path: Path, file: BinaryIO, file_size: int) -> tuple[bytes, int]:
    """The JSON text and the absolute offset at which the tensors start."""
    prefix = file.read(9)
    length = struct.unpack("<Q", prefix[:8])[0] if len(prefix) == 9 else 0
    if length > FORMAT_MAX_BYTES or prefix[8:] != b"{":
        raise ValueError(f"{path} is not a safetensors file: it is {describe_file(path)}")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"{path} has a header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
    if 8 + length > file_size:
        raise ValueError(f"{path} is truncated: its header alone promises {8 + length} bytes, the file has {file_size}")
    file.seek(8)
    return file.read(length), 8 + length


def _metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(entry, str) for entry in value.values()):
        raise ValueError("__metadata__ is not an object of strings")
    return value


def _is_size(value: Any) -> bool:
    # bool is an int to Python, but not to JSON.
    return type(value) is int and 0 <= value < 2**63


def _tensor_info(name: str, entry: Any, data_start: int) -> TensorInfo:
    check_name(name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"tensor {name!r} has dtype {brief(dtype)}; known are {', '.join(DTYPE_BITS)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_size(size) for size in shape):
        raise ValueError(f"tensor {name!r} has shape {brief(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise ValueError(f"tensor {name!r} has data_offsets {brief(offsets)}")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise ValueError(
            f"tensor {name!r} ({dtype}, shape {brief(shape)}) takes {bits // 8} bytes, "
            f"but its data_offsets {offsets} hold {offsets[1] - offsets[0]}"
        )
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _check_contiguous(tensors: Mapping[str, TensorInfo], data_start: int) -> int:
    """Every byte of the data belongs to exactly one tensor. Returns the absolute end."""
    end = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != end:
            raise ValueError(f"tensor {name!r} starts at byte {info.start}; the one before it ends at {end}")
        end = info.end
    return end
