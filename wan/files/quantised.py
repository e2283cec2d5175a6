"""Which stored tensors are weights, which are the scales of quantised weights, and which formats cannot be read.

    scheme                          beside X.weight (fp8 or int8)
    fp8, plain                      nothing: the codes are the weight
    ComfyUI, Kijai (fp8_scaled)     X.scale_weight, often X.scale_input; once per file: scaled_fp8
    ComfyUI with metadata           X.weight_scale, X.input_scale; formats in the header or in X.comfy_quant
    LightX2V (fp8, int8)            X.weight_scale with one number per output row
    quanto (fp8, int8)              X.weight._data and X.weight._scale in place of X.weight
    scaled by blocks                X.weight_scale of their number; nvfp4, mxfp8 and others (block_scaled.py)
    ComfyUI's int8 with ConvRot     as int8, with `convrot` in X.comfy_quant (rotated.py)

Scales of inputs serve products of fp8 by fp8 only; products here take the unpacked weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..model.eight_bits import E4M3
from .block_scaled import BlockScaled, tiled_size
from .quant_formats import BY_BLOCKS, READABLE, QuantFormat
from .rotated import Rotated
from .stored_tensor import DTYPES, PackedTensor, PlainTensor, RowScale, StoredTensor, StridedTensor

if TYPE_CHECKING:
    from .stored_model import OpenedFile, StoredModel

READS = "this version reads fp32, bf16, fp16, fp8, int8 (ConvRot too), mxfp8, nvfp4 and GGUF files"

_SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
_FACTOR = ".weight_scale_2"
"""nvfp4's one number for all of its scales."""
_IGNORED = (".scale_input", ".input_scale", ".output_scale", ".comfy_quant")
_MARKER = "scaled_fp8"

# The end of a tensor's name -> the format that has it.
_REFUSED = {
    ".weight_global_scale": "nvfp4 of another library",
    ".wscales": "Nunchaku (SVDQuant, 4 bit)",
    ".qzeros": "AWQ or GPTQ (4 bit)",
    ".qweight": "a packed 4-bit format",
    ".weight_packed": "a packed 4-bit format",
    ".weight_zero_point": "a format with zero points",
    ".weight.absmax": "bitsandbytes (4 bit)",
    ".weight.SCB": "bitsandbytes (int8)",
    ".SCB": "bitsandbytes (int8)",
    ".weight._shift": "quanto with zero points (4 bit or fewer)",
}
_REFUSED_DTYPES = {
    "F4": "a 4-bit float format (nvfp4 or mxfp4)",
    "F6_E2M3": "mxfp6",
    "F6_E3M2": "mxfp6",
}
USUAL_BLOCK = 128
"""Of fp8 and int8 scaled by blocks."""
_BYTES = ("U8", "F8_E8M0")
"""Codes and scales that are no numbers by themselves."""


def stored_tensor(file: OpenedFile, name: str) -> StoredTensor:
    """Where a tensor's values are. Raises ValueError for a dtype that cannot be read."""
    info = file.tensors[name]
    if file.gguf is not None:
        return PackedTensor(file.gguf, name)
    if info.dtype not in DTYPES and info.dtype not in _BYTES:
        raise ValueError(f"tensor {name} is {info.dtype}; it must be one of {', '.join(DTYPES)}")
    dtype = DTYPES.get(info.dtype, torch.uint8)
    if info.strides is None:
        return PlainTensor(file.path, dtype, info.shape, info.start)
    span = (info.end - info.start) // dtype.itemsize
    return StridedTensor(PlainTensor(file.path, dtype, (span,), info.start), info.shape, info.strides)


def paired_weights(model: StoredModel, names: Mapping[str, str]) -> dict[str, StoredTensor]:
    """`StoredModel.weights`."""
    # One number in another dtype is a mark; a weight of that name would be missed.
    used = {
        name: own
        for name, own in names.items()
        if not is_unused(own) and (math.prod(model.tensors[name].shape) > 1 or _readable(model, name))
    }
    # What names no tensor may be meant for any: better refused than read wrongly.
    formats = {
        layer: kind
        for layer, kind in model.formats.items()
        if f"{layer}.weight" in names or f"{layer}.weight" not in model.tensors
    }
    plain = {name: model.tensors[name].dtype for name in names if model.holders[name].gguf is None}
    refused = _refused_format(plain, formats)
    if refused is not None:
        raise ValueError(f"it is quantised as {refused}; {READS}")
    wrong = [name for name in used if not _readable(model, name)]
    if wrong:
        raise ValueError(f"it holds {len(wrong)} tensors such as {wrong[0]} in {plain[wrong[0]]}; {READS}")
    told = {names[f"{layer}.weight"]: kind for layer, kind in formats.items() if f"{layer}.weight" in names}
    return pair_scales({own: stored_tensor(model.holders[name], name) for name, own in used.items()}, told)


def _readable(model: StoredModel, name: str) -> bool:
    return model.holders[name].gguf is not None or model.tensors[name].dtype in (*DTYPES, *_BYTES)


def _refused_format(dtypes: Mapping[str, str], formats: Mapping[str, QuantFormat]) -> str | None:
    """Names the quantised format of a file that cannot be read; None for one that may be.

    Args:
        dtypes: tensor name -> dtype as safetensors names it.
        formats: layer -> format, as far as the file says so (`quant_formats`).
    """
    for layer, kind in formats.items():
        if kind.name not in READABLE:
            return f"{kind.name} ({layer})"
    for name, dtype in dtypes.items():
        for ending, refused in _REFUSED.items():
            if name.endswith(ending):
                return f"{refused} ({name})"
        if name.endswith(".weight") and dtype in _REFUSED_DTYPES:
            return f"{_REFUSED_DTYPES[dtype]} ({name})"
    return None


def is_unused(name: str) -> bool:
    """Whether a tensor only describes how to compute with quantised weights."""
    return name == _MARKER or name.endswith(_IGNORED)


def pair_scales(
    stored: Mapping[str, StoredTensor], formats: Mapping[str, QuantFormat] | None = None
) -> dict[str, StoredTensor]:
    """Gives quantised weights their scales; those of tensors and rows become `X.weight_scale` of [rows, 1].

    Args:
        formats: weight -> what its file says of it.
    Raises:
        ValueError: a scale fits no weight, codes have none, or it is not what its file says.
    """
    paired: dict[str, StoredTensor] = {}
    scales: dict[str, StoredTensor] = {}
    factors: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        ending = next((ending for ending in (*_SCALES, _FACTOR) if name.endswith(ending)), None)
        if ending is None:
            paired[name] = tensor
            continue
        found, weight = (factors if ending == _FACTOR else scales), f"{name.removesuffix(ending)}.weight"
        if weight in found:
            raise ValueError(f"tensor {weight} has two scales")
        found[weight] = tensor
    for weight in (*scales, *(set(factors) - set(scales))):
        codes, scale, factor = paired.get(weight), scales.get(weight), factors.get(weight)
        if not isinstance(codes, PlainTensor) or not codes.shape or not isinstance(scale, PlainTensor):
            raise ValueError(f"there is a scale for tensor {weight}, but no such weight")
        blocks = _block_scaled(weight, codes, scale, factor)
        if blocks is not None:
            paired[weight] = blocks
            continue
        if not scale.dtype.is_floating_point:
            raise ValueError(f"the scale of tensor {weight} is of {scale.dtype}; expected a float dtype")
        by_row = RowScale(scale, codes.shape[0])
        paired[weight] = replace(codes, scale=by_row)
        paired[f"{weight}_scale"] = by_row
    for name, kind in (formats or {}).items():
        tensor = paired[name]
        if kind.name in BY_BLOCKS and not isinstance(tensor, BlockScaled):
            raise ValueError(f"tensor {name} is said to be {kind.name}, but it has no such codes and scales")
        if not kind.rotated_by:
            continue
        if len(tensor.shape) != 2 or tensor.shape[1] % kind.rotated_by:
            raise ValueError(
                f"tensor {name} of shape {tensor.shape} is said to be rotated by groups of {kind.rotated_by} inputs"
            )
        paired[name] = Rotated(tensor, kind.rotated_by)
    for name, tensor in paired.items():
        if isinstance(tensor, PlainTensor) and tensor.scale is None and tensor.nbytes > 1:
            if tensor.dtype == torch.int8:
                raise ValueError(f"tensor {name} is int8 without a scale; {READS}")
            if tensor.dtype == torch.uint8:
                raise ValueError(f"tensor {name} is quantised as a packed format of 8 bits or fewer; {READS}")
    return paired


def _block_scaled(
    weight: str, codes: PlainTensor, scale: PlainTensor, factor: StoredTensor | None
) -> BlockScaled | None:
    """None: one scale for all, or one for each row. Raises ValueError if the scales fit nothing."""
    rows, number = codes.shape[0], math.prod(scale.shape)
    packed = codes.dtype == torch.uint8
    if not packed and factor is None and (number == 1 or scale.shape in ((rows,), (rows, 1))):
        return None
    problem = (
        f"the scale of tensor {weight} has shape {scale.shape}; expected one number, one for each of its {rows} rows, "
        f"or one for each block of the weight's {' x '.join(map(str, codes.shape))}; {READS}"
    )
    if len(codes.shape) != 2 or 0 in codes.shape:
        raise ValueError(problem)
    if packed or scale.dtype == torch.uint8 or factor is not None:
        block = (1, 16 if packed else 32)
        fits = scale.dtype == (E4M3 if packed else torch.uint8) and packed == (factor is not None)
        if factor is not None and not isinstance(factor, PlainTensor):
            raise ValueError(problem)
        if factor is not None:
            fits = fits and math.prod(factor.shape) == 1 and factor.dtype.is_floating_point
        width = codes.shape[1] * (2 if packed else 1)
        if not fits or width % block[1] or number != tiled_size(rows, width // block[1]):
            raise ValueError(problem)
        return BlockScaled(codes, scale, block, tiled=True, factor=factor)
    if len(scale.shape) != 2 or not scale.dtype.is_floating_point:
        raise ValueError(problem)
    steps = [_step(size, count) for size, count in zip(codes.shape, scale.shape, strict=True)]
    rows_step, columns_step = steps
    # One column of fewer scales than rows is of something else.
    if rows_step is None or columns_step is None or (scale.shape[1] == 1 and rows_step != USUAL_BLOCK):
        raise ValueError(problem)
    return BlockScaled(codes, scale, (rows_step, columns_step), tiled=False)


def _step(size: int, blocks: int) -> int | None:
    """Elements of a block, of `blocks` that cover `size`: the usual 128 with a smaller last one, or equal ones."""
    if blocks == math.ceil(size / USUAL_BLOCK):
        return min(USUAL_BLOCK, size)
    return size // blocks if blocks and size % blocks == 0 else None
