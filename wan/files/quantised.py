"""Which stored tensors are weights, which are the scales of quantised weights, and which formats cannot be read.

    scheme                          beside X.weight (fp8 or int8)
    fp8, plain                      nothing: the codes are the weight
    ComfyUI, Kijai (fp8_scaled)     X.scale_weight, often X.scale_input; once per file: scaled_fp8
    ComfyUI with metadata           X.weight_scale, X.input_scale; formats in the header or in X.comfy_quant
    LightX2V (fp8, int8)            X.weight_scale with one number per output row
    quanto (fp8, int8)              X.weight._data and X.weight._scale in place of X.weight
    torchao (fp8, int8)             X._weight_qdata and X._weight_scale in place of X.weight
    scaled by blocks                X.weight_scale of their number; nvfp4, mxfp8 and others (block_scaled.py)
    ComfyUI's int8 with ConvRot     as int8, with `convrot` in X.comfy_quant (rotated.py); int4 and w4a8 likewise

Scales of inputs serve products of fp8 by fp8 only; products here take the unpacked weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..model.eight_bits import E4M3
from .block_scaled import GROUPED, BlockScaled, grouped, tiled_size
from .quant_formats import BLOCKS_OF, INT4, MXFP8, NVFP4, READABLE, W4A8, QuantFormat, placed
from .rotated import Rotated
from .stored_tensor import DTYPES, PackedTensor, PlainTensor, RowScale, StoredTensor, StridedTensor

if TYPE_CHECKING:
    from .stored_model import OpenedFile, StoredModel

READS = (
    "this version reads fp32, bf16, fp16, fp8, int8 (ConvRot too), int4 and w4a8 (ConvRot), mxfp8, nvfp4 and GGUF files"
)

_SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
_FACTORS = (".weight_scale_2", ".scale_weight_2")
"""nvfp4's one number for all of its scales."""
_IGNORED = (".scale_input", ".input_scale", ".output_scale", ".comfy_quant")
_MARKER = "scaled_fp8"

# The end of a tensor's name -> the format that has it, the surest first.
_REFUSED = {
    ".weight_global_scale": "nvfp4 of another library",
    ".wscales": "Nunchaku (SVDQuant, 4 bit)",
    ".qzeros": "AWQ or GPTQ (4 bit)",
    ".weight_zero_point": "a format with zero points",
    ".weight_correction": "w4a8 with zero points",
    ".zero_point": "SDNQ or another format with zero points",
    ".svd_up": "SDNQ (with SVD)",
    ".W_q": "HQQ (with zero points)",
    ".pre_quant_scale": "ModelOpt's AWQ",
    ".qweight": "a packed 4-bit format",
    ".weight_packed": "a packed 4-bit format",
    ".weight.absmax": "bitsandbytes (4 bit)",
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
_FP8 = {f"float8_{name}": dtype for name, dtype in (("e4m3fn", E4M3), ("e5m2", torch.float8_e5m2))}
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
    told, lost = placed(model.formats, model.tensors, names)
    plain = {name: model.tensors[name].dtype for name in names if model.holders[name].gguf is None}
    refused = _refused_format(plain, told | lost)
    if refused is not None:
        raise ValueError(f"it is quantised as {refused}; {READS}")
    wrong = [name for name in used if not _readable(model, name)]
    if wrong:
        raise ValueError(f"it holds {len(wrong)} tensors such as {wrong[0]} in {plain[wrong[0]]}; {READS}")
    for layer, kind in lost.items():
        if kind.rotated_by or kind.block:
            raise ValueError(f"it is said of {layer}, which it does not hold, how it is quantised")
    kinds = {names[name]: kind for name, kind in told.items()}
    paired = pair_scales({own: stored_tensor(model.holders[name], name) for name, own in used.items()}, kinds)
    for name, own in used.items():
        # ComfyUI's are always under the official names; ModelOpt, which exports diffusers' models, has its scales in
        # rows and the first code in the low bits.
        tensor = paired.get(own)
        if isinstance(tensor, BlockScaled) and tensor.tiled and own not in kinds and not name.endswith(own):
            raise ValueError(f"it is quantised as {NVFP4} or {MXFP8} of another library than ComfyUI ({name}); {READS}")
    return paired


def _readable(model: StoredModel, name: str) -> bool:
    return model.holders[name].gguf is not None or model.tensors[name].dtype in (*DTYPES, *_BYTES)


def _refused_format(dtypes: Mapping[str, str], formats: Mapping[str, QuantFormat]) -> str | None:
    """Names the quantised format of a file that cannot be read; None for one that may be.

    Args:
        dtypes: by tensor name, as safetensors names them.
        formats: by weight, as far as the file says so.
    """
    for weight, kind in formats.items():
        if kind.name not in READABLE:
            return f"{kind.name} ({weight.removesuffix('.weight')})"
    found = [name for name in dtypes if name.endswith(tuple(_REFUSED))]
    for ending, refused in _REFUSED.items():
        for name in found:
            if name.endswith(ending):
                return f"{refused} ({name})"
    for name, dtype in dtypes.items():
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
    formats = formats or {}
    paired: dict[str, StoredTensor] = {}
    scales: dict[str, StoredTensor] = {}
    factors: dict[str, StoredTensor] = {}
    taken: set[str] = set()
    for name, kind in formats.items():
        if kind.name == W4A8:
            paired[name] = made = grouped(name, stored, kind.block[1] if kind.block else 0)
            paired[f"{name}_scale"] = made.scale
            taken |= {name, *(name + ending for ending in GROUPED)}
    endings = (*_SCALES, *_FACTORS)
    for name, tensor in stored.items():
        if name in taken:
            continue
        if not name.endswith(endings):
            paired[name] = _typed(tensor, formats.get(name))
            continue
        ending = next(ending for ending in endings if name.endswith(ending))
        found, weight = (factors if ending in _FACTORS else scales), f"{name.removesuffix(ending)}.weight"
        if weight in found:
            raise ValueError(f"tensor {weight} has two scales")
        found[weight] = tensor
    for weight in (*scales, *(set(factors) - set(scales))):
        codes, scale, factor = paired.get(weight), scales.get(weight), factors.get(weight)
        if not isinstance(codes, PlainTensor) or not codes.shape or not isinstance(scale, PlainTensor):
            raise ValueError(f"there is a scale for tensor {weight}, but no such weight")
        blocks = _block_scaled(weight, codes, scale, factor, formats.get(weight))
        if blocks is not None:
            bias = paired.get(weight.removesuffix("weight") + "bias")
            paired[weight] = _unpadded(blocks, formats.get(weight), bias)
            continue
        if not scale.dtype.is_floating_point:
            raise ValueError(f"the scale of tensor {weight} is of {scale.dtype}; expected a float dtype")
        by_row = RowScale(scale, codes.shape[0])
        paired[weight] = replace(codes, scale=by_row)
        paired[f"{weight}_scale"] = by_row
    for name, kind in formats.items():
        tensor = paired[name]
        if (kind.name in (*BLOCKS_OF, INT4) or kind.rotated_by) and name not in scales and name not in taken:
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


def _typed(tensor: StoredTensor, kind: QuantFormat | None) -> StoredTensor:
    """With the dtype that its file says of it: fp8 may be stored as bytes."""
    said = None if kind is None else E4M3 if kind.name == MXFP8 else _FP8.get(kind.name.partition("_row")[0])
    if said is None or not isinstance(tensor, PlainTensor) or tensor.dtype != torch.uint8:
        return tensor
    return replace(tensor, dtype=said)


def _unpadded(blocks: BlockScaled, kind: QuantFormat | None, bias: StoredTensor | None) -> BlockScaled:
    """Without padding that can be told by what is said of the layer, or by its bias."""
    rows, columns = blocks.shape
    if kind is not None and kind.shape is not None and len(kind.shape) == 2:
        return blocks.without_padding(kind.shape)
    if bias is not None and len(bias.shape) == 1 and bias.shape[0] < rows:
        return blocks.without_padding((bias.shape[0], columns))
    return blocks


def _block_scaled(
    weight: str, codes: PlainTensor, scale: PlainTensor, factor: StoredTensor | None, kind: QuantFormat | None
) -> BlockScaled | None:
    """None: one scale for all, or one for each row. Raises ValueError if the scales fit nothing."""
    rows, number = codes.shape[0], math.prod(scale.shape)
    packed = codes.dtype == torch.uint8
    told = None if kind is None else kind.block
    of = f"block of {told[0]} x {told[1]}" if told else "block"
    problem = (
        f"the scale of tensor {weight} has shape {scale.shape}; expected one number, one for each of its {rows} rows, "
        f"or one for each {of} of the weight's {' x '.join(map(str, codes.shape))}; {READS}"
    )
    if kind is not None and kind.name == INT4:
        if len(codes.shape) != 2 or codes.dtype.itemsize != 1 or number != rows or not scale.dtype.is_floating_point:
            raise ValueError(problem)
        return BlockScaled(replace(codes, dtype=torch.uint8), scale, (1, 2 * codes.shape[1]), tiled=False, int4=True)
    tiles = packed or scale.dtype == torch.uint8 or factor is not None
    if kind is not None and tiles != (kind.name in (NVFP4, MXFP8)):
        raise ValueError(f"tensor {weight} is said to be {kind.name}, but it has no such codes and scales")
    if not tiles and told is None and (number == 1 or scale.shape[:1] == (rows,) == (number,)):
        return None
    if len(codes.shape) != 2 or 0 in codes.shape:
        raise ValueError(problem)
    if tiles:
        block = (1, BLOCKS_OF[NVFP4 if packed else MXFP8] or 0)
        if packed and scale.dtype == torch.uint8 and kind is not None:
            # The same bytes, as ComfyUI reads them; of others they may be powers of two.
            scale = replace(scale, dtype=E4M3)
        fits = scale.dtype == (E4M3 if packed else torch.uint8) and packed == (factor is not None)
        if factor is not None and not isinstance(factor, PlainTensor):
            raise ValueError(problem)
        if factor is not None:
            fits = fits and math.prod(factor.shape) == 1 and factor.dtype.is_floating_point
        width = codes.shape[1] * (2 if packed else 1)
        across = width // block[1]
        if not fits or width % block[1] or number not in (tiled_size(rows, across), rows * across):
            raise ValueError(problem)
        return BlockScaled(codes, scale, block, tiled=number == tiled_size(rows, across), factor=factor)
    counts = scale.shape if scale.shape else (1, 1)
    if len(counts) == 1:
        counts = (*counts, 1)
    if len(counts) != 2 or not scale.dtype.is_floating_point:
        raise ValueError(problem)
    sizes = told or (0, 0)
    steps = [_step(size, count, most) for size, count, most in zip(codes.shape, counts, sizes, strict=True)]
    rows_step, columns_step = steps
    # One column of fewer scales than rows is of something else.
    strange = told is None and counts[1] == 1 and rows_step != USUAL_BLOCK
    if rows_step is None or columns_step is None or strange:
        raise ValueError(problem)
    if columns_step == codes.shape[1] and rows_step in (1, rows):
        return None
    return BlockScaled(codes, scale, (rows_step, columns_step), tiled=False)


def _step(size: int, count: int, told: int) -> int | None:
    """Elements of a block, of `count` that cover `size`, the last of which may be smaller; None: there is no such.

    Args:
        told: at most so many; 0: not said. Then it is a power of two, which only one can be, or they are equal.
    """
    if count == size:
        return 1
    if told:
        return min(told, size) if count == math.ceil(size / told) else None
    if count == 1:
        return size
    powers = (2**exponent for exponent in range(size.bit_length()))
    found = next((step for step in powers if math.ceil(size / step) == count), None)
    return found or (size // count if count and size % count == 0 else None)
