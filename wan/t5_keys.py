"""Tensor names and sizes of umT5 encoders, and the check of their files' headers. Standard library only."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .identify import describe_tensors
from .model_index import read_index
from .tokenizer_files import choose_tokenizer_file

EXPECTED = (
    "a umT5 text encoder (umt5_xxl_fp16.safetensors, umt5_xxl_fp8_e4m3fn_scaled.safetensors, "
    "models_t5_umt5-xxl-enc-bf16.pth)"
)
SPIECE_MODEL = "spiece_model"
"""A uint8 tensor holding the SentencePiece model, in the files made for ComfyUI."""

PREFIXES = ("", "model.", "transformer.", "text_encoders.umt5xxl.transformer.")
"""In front of every name of the encoder, by who saved the file."""

SCALES = ("scale_weight", "weight_scale")
"""Beside a quantised `weight`: multiply by it, one number or one per output row."""

_EMBEDDING_ALIAS = "encoder.embed_tokens"
_WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8")
_SCALE_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class TextEncoderInfo:
    """One text encoder. The sizes of a .pth are None where only loading it would tell."""

    dim: int | None
    """Channels of the rows it gives the diffusion model."""
    vocab: int | None
    """Token ids it knows."""
    layers: int
    heads: int | None
    head_dim: int | None
    ffn_dim: int | None
    buckets: int | None
    """Relative distances it tells apart."""
    prefix: str
    """In front of every tensor name."""
    official: bool
    """Official names rather than transformers' (ComfyUI has the latter)."""
    spiece_model: str | None
    """Name of the tensor that holds its SentencePiece model, if it carries one."""


def module_names(layers: int) -> dict[str, str]:
    """Official module path -> transformers module path, for every `weight` of an encoder."""
    names = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
    for layer in range(layers):
        official, hf = f"blocks.{layer}", f"encoder.block.{layer}.layer"
        names[f"{official}.norm1"] = f"{hf}.0.layer_norm"
        names |= {f"{official}.attn.{part}": f"{hf}.0.SelfAttention.{part}" for part in "qkvo"}
        names[f"{official}.pos_embedding.embedding"] = f"{hf}.0.SelfAttention.relative_attention_bias"
        names[f"{official}.norm2"] = f"{hf}.1.layer_norm"
        # The gate is the side that goes through the activation.
        for ours, theirs in (("gate.0", "wi_0"), ("fc1", "wi_1"), ("fc2", "wo")):
            names[f"{official}.ffn.{ours}"] = f"{hf}.1.DenseReluDense.{theirs}"
    return names


def hf_to_official(name: str, layers: int) -> str:
    """A transformers tensor name -> the official one. KeyError for a name the encoder does not have."""
    module, _, leaf = name.rpartition(".")
    return {theirs: ours for ours, theirs in module_names(layers).items()}[module] + "." + leaf


def source_names(info: TextEncoderInfo, names: Collection[str]) -> dict[str, str]:
    """transformers module path -> module path in the file, prefix included."""
    pairs = module_names(info.layers)
    source = {hf: info.prefix + (official if info.official else hf) for official, hf in pairs.items()}
    if source["shared"] + ".weight" not in names and not info.official:
        source["shared"] = info.prefix + _EMBEDDING_ALIAS
    return source


def text_encoder_info(
    names: Collection[str], shapes: Mapping[str, tuple[int, ...]] | None, path: str | Path
) -> TextEncoderInfo:
    """Recognises a umT5 encoder by its names and reads its sizes off its shapes.

    Args:
        names: tensor names as in the file or files.
        shapes: name -> shape, or None if only the names are known.
        path: for messages.
    Raises:
        ValueError: not a umT5 encoder, or one that lacks tensors.
    """
    for prefix in PREFIXES:
        official = f"{prefix}blocks.0.pos_embedding.embedding.weight" in names
        if official or f"{prefix}encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in names:
            break
    else:
        raise ValueError(f"{path} is {describe_tensors(names)}; expected {EXPECTED}")
    stem = f"{prefix}{'blocks' if official else 'encoder.block'}."
    numbers = {name[len(stem) :].partition(".")[0] for name in names if name.startswith(stem)}
    layers = len({number for number in numbers if number.isdecimal()})
    spiece = next((name for name in names if name.split(".")[-1] == SPIECE_MODEL), None)
    info = TextEncoderInfo(None, None, layers, None, None, None, None, prefix, official, spiece)
    source = source_names(info, names)
    missing = sorted(module for module in source.values() if f"{module}.weight" not in names)
    if missing:
        kind = describe_tensors(names)
        raise ValueError(
            f"{path} is {kind} that lacks {len(missing)} tensors ({', '.join(missing[:3])}); expected {EXPECTED}, "
            "all of its files"
        )
    if shapes is None:
        return info

    def size(module: str) -> tuple[int, int]:
        name = f"{source[module]}.weight"
        if len(shapes[name]) != 2 or 0 in shapes[name]:
            raise ValueError(f"{path} has tensor {name} of shape {list(shapes[name])}; it must be a matrix")
        return shapes[name][0], shapes[name][1]

    vocab, dim = size("shared")
    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = size(f"{attention}.relative_attention_bias")
    inner, _ = size(f"{attention}.q")
    ffn_dim, _ = size("encoder.block.0.layer.1.DenseReluDense.wi_0")
    if inner % heads:
        raise ValueError(f"{path} has {inner} attention channels and {heads} heads; they do not divide")
    return TextEncoderInfo(dim, vocab, layers, heads, inner // heads, ffn_dim, buckets, prefix, official, spiece)


def check_weight(path: str | Path, name: str, dtype: str, scale: tuple[str, tuple[int, ...]] | None) -> None:
    """Raises ValueError for a weight stored in a way that cannot be turned back into floats.

    Args:
        name: the tensor, for the message.
        dtype: as in a safetensors header.
        scale: dtype and shape of the scale beside it, if there is one.
    """
    if dtype not in _WEIGHT_DTYPES or (dtype == "I8" and scale is None):
        raise ValueError(
            f"{path} stores {name} as {dtype} in a quantised format that is not supported; "
            "expected float32, float16, bfloat16, float8 or float8 with one scale per tensor or row"
        )
    # One number, or one per row. Anything larger scales blocks (mxfp8, nvfp4).
    if scale is not None and (scale[0] not in _SCALE_DTYPES or any(size != 1 for size in scale[1][1:])):
        raise ValueError(
            f"{path} scales {name} in blocks ({scale[0]}, shape {list(scale[1])}), which is not supported; "
            "expected one scale per tensor or row"
        )


def check_text_encoder_files(files: Sequence[str | Path], tokenizer_files: Sequence[str | Path]) -> TextEncoderInfo:
    """Reads headers only: is this a complete umT5 encoder, and is there a tokenizer for it.

    Args:
        files: one file, or every shard of one; JSON files among them are ignored.
        tokenizer_files: tokenizer.json or a SentencePiece model; unused if the encoder carries its own.
    Raises:
        ValueError: naming the file, what it is, and what was expected.
    """
    index = read_index(files, EXPECTED)
    info = text_encoder_info(index.names, index.shapes, index.label)
    if index.tensors is not None:
        for module in source_names(info, index.names).values():
            scales = [index.tensors[f"{module}.{scale}"] for scale in SCALES if f"{module}.{scale}" in index.names]
            check_weight(
                index.label,
                f"{module}.weight",
                index.tensors[f"{module}.weight"].dtype,
                (scales[0].dtype, scales[0].shape) if scales else None,
            )
    if info.spiece_model is None:
        choose_tokenizer_file(tokenizer_files, index.label)
    return info
