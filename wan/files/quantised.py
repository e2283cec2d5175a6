"""Which stored tensors are weights, which are the scales of quantised weights, and which formats cannot be read.

    scheme                          beside X.weight (fp8 or int8)
    fp8, plain                      nothing: the codes are the weight
    ComfyUI, Kijai (fp8_scaled)     X.scale_weight, often X.scale_input; once per file: scaled_fp8
    ComfyUI with metadata           X.weight_scale, X.input_scale; formats in the header or in X.comfy_quant
    LightX2V (fp8, int8)            X.weight_scale with one number per output row
    quanto (fp8, int8)              X.weight._data and X.weight._scale in place of X.weight

Scales of inputs serve products of fp8 by fp8 only; products here take the unpacked weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from .quant_formats import READABLE
from .stored_tensor import DTYPES, PackedTensor, PlainTensor, RowScale, StoredTensor, StridedTensor

if TYPE_CHECKING:
    from .stored_model import OpenedFile, StoredModel

READS = "this version reads fp32, bf16, fp16, fp8 (plain or scaled by rows or tensors), int8 and GGUF files"

_SCALES = (".scale_weight", ".weight_scale")
_IGNORED = (".scale_input", ".input_scale", ".output_scale", ".comfy_quant")
_MARKER = "scaled_fp8"

# The end of a tensor's name -> the format that has it.
_REFUSED = {
    ".weight_scale_2": "nvfp4",
    ".weight_global_scale": "nvfp4",
    ".weight_scale_inv": "fp8 scaled by blocks",
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
    "U8": "a packed format of 8 bits or fewer",
}
_SCALE_DTYPES = {"F8_E8M0": "mxfp8 or mxfp4", "U8": "mxfp8 or mxfp4", "F8_E4M3": "nvfp4"}
"""Of the scales of formats with one scale per block of a row."""


def stored_tensor(file: OpenedFile, name: str) -> StoredTensor:
    """Where a tensor's values are. Raises ValueError for a dtype that cannot be read."""
    info = file.tensors[name]
    if file.gguf is not None:
        return PackedTensor(file.gguf, name)
    if info.dtype not in DTYPES:
        raise ValueError(f"tensor {name} is {info.dtype}; it must be one of {', '.join(DTYPES)}")
    dtype = DTYPES[info.dtype]
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
    return pair_scales({own: stored_tensor(model.holders[name], name) for name, own in used.items()})


def _readable(model: StoredModel, name: str) -> bool:
    return model.holders[name].gguf is not None or model.tensors[name].dtype in DTYPES


def _refused_format(dtypes: Mapping[str, str], formats: Mapping[str, str]) -> str | None:
    """Names the quantised format of a file that cannot be read; None for one that may be.

    Args:
        dtypes: tensor name -> dtype as safetensors names it.
        formats: layer -> format, as far as the file says so (`quant_formats`).
    """
    for layer, kind in formats.items():
        if kind not in READABLE:
            return f"{kind} ({layer})"
    for name, dtype in dtypes.items():
        for ending, kind in _REFUSED.items():
            if name.endswith(ending):
                return f"{kind} ({name})"
        if name.endswith(_SCALES) and dtype in _SCALE_DTYPES:
            return f"{_SCALE_DTYPES[dtype]} ({name})"
        if name.endswith(".weight") and dtype in _REFUSED_DTYPES:
            return f"{_REFUSED_DTYPES[dtype]} ({name})"
    return None


def is_unused(name: str) -> bool:
    """Whether a tensor only describes how to compute with quantised weights."""
    return name == _MARKER or name.endswith(_IGNORED)


def pair_scales(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Gives quantised weights their scales, which become tensors `X.weight_scale` of [rows, 1].

    Raises:
        ValueError: a scale fits no weight, or an int8 weight has none.
    """
    paired: dict[str, StoredTensor] = {}
    scales: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        ending = next((ending for ending in _SCALES if name.endswith(ending)), None)
        if ending is not None:
            weight = f"{name.removesuffix(ending)}.weight"
            if weight in scales:
                raise ValueError(f"tensor {weight} has two scales")
            scales[weight] = tensor
        else:
            paired[name] = tensor
    for weight, scale in scales.items():
        tensor = paired.get(weight)
        if not isinstance(tensor, PlainTensor) or not tensor.shape or not isinstance(scale, PlainTensor):
            raise ValueError(f"there is a scale for tensor {weight}, but no such weight")
        rows = tensor.shape[0]
        if math.prod(scale.shape) != 1 and scale.shape not in ((rows,), (rows, 1)):
            raise ValueError(
                f"the scale of tensor {weight} has shape {scale.shape}; expected one number, or one for each of its "
                f"{rows} rows. It may be a format that is scaled by blocks; {READS}"
            )
        if not scale.dtype.is_floating_point:
            raise ValueError(f"the scale of tensor {weight} is of {scale.dtype}; expected a float dtype")
        by_row = RowScale(scale, rows)
        paired[weight] = PlainTensor(tensor.path, tensor.dtype, tensor.shape, tensor.offset, by_row)
        paired[f"{weight}_scale"] = by_row
    for name, tensor in paired.items():
        if (
            isinstance(tensor, PlainTensor)
            and tensor.dtype == torch.int8
            and tensor.scale is None
            and tensor.nbytes > 1
        ):
            raise ValueError(f"tensor {name} is int8 without a scale; {READS}")
    return paired
