"""How a safetensors file says that its layers are quantised.

ComfyUI writes it in two ways: a JSON object `_quantization_metadata` in the header, or one tensor
`<layer>.comfy_quant` per layer whose bytes are a JSON object. Older files say nothing and just have scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .headers import MAX_PARTS, SafetensorsHeader, brief
from .json_text import parse_json
from .regular_files import read_range

METADATA = "_quantization_metadata"
TENSOR = ".comfy_quant"
MAX_TENSOR_BYTES = 1024
MAX_TENSOR_PARTS = 64
"""Of what a file says of one layer; in the releases under 200 bytes, with four values."""
MAX_FORMAT_NAME = 64
BY_BLOCKS = ("int8_blockwise", "nvfp4", "mxfp8")
READABLE = ("float8_e4m3fn", "float8_e4m3fn_rowwise", "float8_e5m2", "int8_tensorwise", "int8_rowwise", *BY_BLOCKS)
"""Turned back into floats by one factor per tensor, per output row or per block."""
ROTATION, ROTATED_BY = "convrot", "convrot_groupsize"
USUAL_GROUP = 256
"""Inputs that are rotated together where a file does not say how many."""

_BLOCKS = ("group_size", "block_size")
"""Said of formats with a scale for each block, whose scales have the shape that goes with it."""
_CHANGING = (
    *("rot", "hadamard", "group", "block", "param", "zero", "offset", "shift", "smooth", "pack", "perm", "transpos"),
    *("svd", "low_rank", "codebook", "lut", "bits", "swizzle", "clip"),
)
"""In the names of options by which codes and scale are not the values: the format is another one."""
_NEUTRAL = (None, False, 0, -1, "", "none")
"""Values that switch such an option off; -1 is a group as long as the row."""


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """How one layer is stored."""

    name: str
    """With the names of options behind it that change what its values mean."""
    rotated_by: int = 0
    """Inputs that were rotated together before they were rounded; 0: none."""


def quant_formats(path: str | Path, header: SafetensorsHeader, file: BinaryIO) -> dict[str, QuantFormat]:
    """Layer (as named in the file) -> the format it is stored in, as far as the file says so.

    Raises:
        ValueError: what the file says cannot be understood; the message names the file.
    """
    try:
        formats = _from_metadata(header.metadata)
        for name in (name for name in header.tensors if name.endswith(TENSOR)):
            info = header.tensors[name]
            if info.end - info.start > MAX_TENSOR_BYTES:
                raise ValueError(f"{name} has {info.end - info.start} bytes; at most {MAX_TENSOR_BYTES}")
            text = bytearray(info.end - info.start)
            read_range(file.fileno(), memoryview(text), info.start, str(path))
            formats[name.removesuffix(TENSOR)] = _format(name, _parse(bytes(text), MAX_TENSOR_PARTS))
    except ValueError as error:
        raise ValueError(f"{path} describes its quantisation in an unknown way: {brief(error)}") from error
    return formats


def _from_metadata(metadata: dict[str, str]) -> dict[str, QuantFormat]:
    if METADATA not in metadata:
        return {}
    value = _parse(metadata[METADATA].encode(), MAX_PARTS)
    layers = value.get("layers") if isinstance(value, dict) else None
    if not isinstance(layers, dict):
        raise ValueError(f"{METADATA} has no layers")
    return {layer: _format(layer, entry) for layer, entry in layers.items()}


def _parse(text: bytes, max_parts: int) -> Any:
    # Trailing zeros pad a tensor's bytes.
    return parse_json(text.rstrip(b"\0"), max_parts)


def _format(layer: str, entry: Any) -> QuantFormat:
    """An option that changes what the values mean makes it another format."""
    name = entry.get("format") if isinstance(entry, dict) else entry
    if not isinstance(name, str) or len(name) > MAX_FORMAT_NAME:
        raise ValueError(f"the format of {layer} is {brief(entry)}")
    entry = entry if isinstance(entry, dict) else {}
    group = 0
    if entry.get(ROTATION):
        group = entry.get(ROTATED_BY, USUAL_GROUP)
        if type(group) is not int or not is_group(group):
            raise ValueError(f"{ROTATED_BY} of {layer} is {brief(group)}; it must be a power of 4")
    # What else is said only describes: per_row, orig_dtype, orig_shape. Of a rotation that is off, so does its size.
    known = (*_BLOCKS, ROTATION, ROTATED_BY) if name.endswith("blockwise") else (ROTATION, ROTATED_BY)
    told = {key: value for key, value in entry.items() if key not in known}
    changing = (key for key, value in told.items() if key != "format" and value not in (*_NEUTRAL, [], {}))
    options = sorted(key for key in changing if any(word in key.lower() for word in _CHANGING))
    return QuantFormat(" ".join((name, *options)), group)


def is_group(size: int) -> bool:
    """Whether there is a regular Hadamard matrix of that size, as ConvRot makes it: a power of 4."""
    return size >= 4 and size & (size - 1) == 0 and size.bit_length() % 2 == 1
