"""How a safetensors file says that its layers are quantised.

ComfyUI writes it in two ways: a JSON object `_quantization_metadata` in the header, or one tensor
`<layer>.comfy_quant` per layer whose bytes are a JSON object. Older files say nothing and just have scales.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
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
NVFP4, MXFP8 = "nvfp4", "mxfp8"
BLOCKS_OF: dict[str, int | None] = {NVFP4: 16, MXFP8: 32} | dict.fromkeys(
    ("int8_blockwise", "float8_e4m3fn_blockwise", "float8_e5m2_blockwise")
)
"""Format with a scale for each block -> inputs of a block; None: the file says how many."""
BY_FACTOR = (
    *("float8_e4m3fn", "float8_e4m3fn_rowwise", "float8_e5m2", "float8_e5m2_rowwise"),
    *("int8_tensorwise", "int8_rowwise"),
)
INT4 = "convrot_w4a4"
"""Two codes in a byte, a scale for each row, always rotated."""
W4A8 = "asym_w4a8_int8"
"""Two codes in a byte, a scale for each group of inputs and one for each row, always rotated."""
READABLE = (*BY_FACTOR, *BLOCKS_OF, INT4, W4A8)
"""Turned back into floats by one factor per tensor, per output row or per block."""
ROTATION, ROTATED_BY = "convrot", "convrot_groupsize"
USUAL_GROUP = 256
"""Inputs that are rotated together where a file does not say how many."""

_BLOCKS = ("group_size", "block_size")
"""Said of formats with a scale for each block."""
_SHAPE, _PARAMS = "orig_shape", "params"
_ALWAYS_ROTATED = (INT4, W4A8)
_OWN = {INT4: {"quant_group_size"}, W4A8: {*_BLOCKS, "codebook"}} | {name: {*_BLOCKS} for name in BLOCKS_OF}
"""Format -> its own words."""
_CHANGING = (
    *("rot", "hadamard", "group", "block", "param", "zero", "offset", "shift", "smooth", "pack", "perm", "transpos"),
    *("svd", "low_rank", "codebook", "lut", "bits", "swizzle", "first", "nibble"),
)
"""In the names of options by which codes and scale are not the values: the format is another one."""
_NEUTRAL: tuple[Any, ...] = (None, False, 0, -1, "", "none", [], {})
"""Values that switch such an option off; -1 is a group as long as the row."""


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """How one layer is stored."""

    name: str
    """With the names of options behind it that change what its values mean."""
    rotated_by: int = 0
    """Inputs that were rotated together before they were rounded; 0: none."""
    block: tuple[int, int] | None = None
    """Rows and inputs of a block at most: either may be split into ones as well. None: not said."""
    shape: tuple[int, ...] | None = None
    """Of the layer, which its codes may be padded from. None: not said."""


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
    inner = entry.get(_PARAMS)
    if isinstance(inner, dict):
        # ComfyUI looks for an option there where the entry itself does not have it.
        entry = {key: value for key, value in (inner | entry).items() if key != _PARAMS}
    group = 0
    always = name in _ALWAYS_ROTATED
    rotated = entry.get(ROTATION, always)
    if rotated not in (None, False, True) or (always and not rotated):
        # "false" would be taken for true.
        raise ValueError(f"{ROTATION} of {layer} is {brief(rotated)}; it must be {'' if always else 'false or '}true")
    if rotated:
        group = entry.get(ROTATED_BY, USUAL_GROUP)
        if type(group) is not int or not is_group(group):
            raise ValueError(f"{ROTATED_BY} of {layer} is {brief(group)}; it must be a power of 4")
    # What else is said only describes: per_row, orig_dtype. Of a rotation that is off, so does its size.
    known = {"format", ROTATION, ROTATED_BY, _SHAPE} | _OWN.get(name, set())
    block = _block(layer, name, entry) if name in (*BLOCKS_OF, W4A8) else None
    told = {key: value for key, value in entry.items() if key not in known and value not in _NEUTRAL}
    options = sorted(key for key, value in told.items() if _changes(name, key.lower(), value))
    shape = entry.get(_SHAPE)
    sizes = isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
    return QuantFormat(" ".join((name, *options)), group, block, tuple(shape) if sizes else None)


def _changes(name: str, key: str, value: Any) -> bool:
    if "bits" in key and value == (4 if name in (NVFP4, INT4, W4A8) else 8):
        return False
    return any(word in key for word in _CHANGING)


def _block(layer: str, name: str, entry: dict[str, Any]) -> tuple[int, int] | None:
    """Of a format with a scale for each block. Raises ValueError for what is no size, or not the format's."""
    told = {key: entry[key] for key in _BLOCKS if entry.get(key) not in _NEUTRAL}
    fixed, found = BLOCKS_OF.get(name), None
    for key, value in told.items():
        sizes = value if isinstance(value, list) else [value]
        whole = all(type(size) is int and size > 0 for size in sizes) and len(sizes) in (1, 2)
        # Of several rows w4a8 has no groups.
        whole = whole and (name != W4A8 or len(sizes) == 1 or sizes[0] == 1)
        if not whole or (found and found != (sizes[0], sizes[-1])) or (fixed and sizes[-1] != fixed):
            allowed = f"it is {fixed} in {name}" if fixed else "it must be a number, or one for rows and one for inputs"
            raise ValueError(f"{key} of {layer} is {brief(value)}; {allowed}")
        found = sizes[0], sizes[-1]
    return None if fixed else found


def placed(
    formats: Mapping[str, QuantFormat], tensors: Collection[str], wanted: Collection[str]
) -> tuple[dict[str, QuantFormat], dict[str, QuantFormat]]:
    """What files say of the weights `wanted`, and what they say of layers that they do not hold, by weight.

    A layer may be named with another prefix than its tensors have, or with none: ComfyUI looks for it once the prefix
    of the tensors is gone.

    Args:
        formats: by layer.
        tensors: names of all tensors.
    """
    told: dict[str, QuantFormat] = {}
    lost: dict[str, QuantFormat] = {}
    by_end: dict[str, str] = {}
    for layer, kind in formats.items():
        weight = f"{layer}.weight"
        found = next((end for end in _ends(weight) if end in tensors), "")
        if not found:
            by_end = by_end or _by_end(tensors)
            found = by_end.get(weight, "")
        if found in wanted:
            told[found] = kind
        elif not found:
            # It may be meant for any: better refused than read wrongly.
            lost[weight] = kind
    return told, lost


def _by_end(tensors: Collection[str]) -> dict[str, str]:
    """Each end of a weight's name -> the name; "" for an end of several."""
    found: dict[str, str] = {}
    for name in (name for name in tensors if name.endswith(".weight")):
        found |= {end: "" if end in found else name for end in _ends(name)}
    return found


def _ends(name: str) -> Iterator[str]:
    """The name, without its first part, without its first two, ..., down to a module and its parameter."""
    parts = name.split(".")
    for i in range(max(len(parts) - 1, 1)):
        yield ".".join(parts[i:])


def is_group(size: int) -> bool:
    """Whether there is a regular Hadamard matrix of that size, as ConvRot makes it: a power of 4."""
    return size >= 4 and size & (size - 1) == 0 and size.bit_length() % 2 == 1
