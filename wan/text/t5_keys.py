"""Tensor names and sizes of umT5 encoders, and the check of their files' headers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..files.headers import check_shape
from ..files.identify import describe_tensors, prefixes
from ..files.stored_model import StoredModel, open_model
from .gguf_tokenizer import carries_tokenizer
from .tokenizer_bounds import MAX_SPIECE_BYTES
from .tokenizer_files import choose_tokenizer_file

if TYPE_CHECKING:
    from ..files.stored_tensor import StoredTensor

EXPECTED = (
    "a umT5 text encoder (umt5_xxl_fp16.safetensors, umt5_xxl_fp8_e4m3fn_scaled.safetensors, "
    "models_t5_umt5-xxl-enc-bf16.pth, umt5-xxl-encoder-Q8_0.gguf)"
)
SPIECE_MODEL = "spiece_model"
"""A uint8 tensor holding the SentencePiece model, in the files made for ComfyUI."""


OFFICIAL, TRANSFORMERS, LLAMA = "official", "transformers", "llama.cpp"
STACK = "transformers, the encoder by itself"
"""Who named the tensors; ComfyUI keeps transformers' names, GGUF files have llama.cpp's."""

_MARKERS = {
    OFFICIAL: "blocks.0.pos_embedding.embedding.weight",
    TRANSFORMERS: "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    LLAMA: "enc.blk.0.attn_rel_b.weight",
    # Each of transformers' names ends so.
    STACK: "block.0.layer.0.SelfAttention.relative_attention_bias.weight",
}
_LAYERS = {OFFICIAL: "blocks", TRANSFORMERS: "encoder.block", LLAMA: "enc.blk", STACK: "block"}
_EMBEDDING_ALIAS = "encoder.embed_tokens"


@dataclass(frozen=True, slots=True)
class TextEncoderInfo:
    """One text encoder."""

    dim: int
    """Channels of the tokens it gives the diffusion model."""
    vocab: int
    """Token ids it knows."""
    layers: int
    heads: int
    head_dim: int
    ffn_dim: int
    buckets: int
    """Relative distances it tells apart."""
    prefix: str
    """In front of every tensor name."""
    naming: str
    """OFFICIAL, TRANSFORMERS, LLAMA or STACK."""
    spiece_model: str | None
    """Name of the tensor that holds its SentencePiece model, if it carries one."""


_MODULES = {
    "0.layer_norm": ("norm1", "attn_norm"),
    **{f"0.SelfAttention.{part}": (f"attn.{part}", f"attn_{part}") for part in "qkvo"},
    "0.SelfAttention.relative_attention_bias": ("pos_embedding.embedding", "attn_rel_b"),
    "1.layer_norm": ("norm2", "ffn_norm"),
    # The gate is the side that goes through the activation.
    "1.DenseReluDense.wi_0": ("ffn.gate.0", "ffn_gate"),
    "1.DenseReluDense.wi_1": ("ffn.fc1", "ffn_up"),
    "1.DenseReluDense.wo": ("ffn.fc2", "ffn_down"),
}
"""Of a layer: transformers' name -> the official one, and llama.cpp's."""


def module_names(layers: int, naming: str = OFFICIAL) -> dict[str, str]:
    """Official or llama.cpp's module path -> transformers module path, for every `weight` of an encoder."""
    llama = naming == LLAMA
    ends = ("token_embd", "enc.output_norm") if llama else ("token_embedding", "norm")
    names = dict(zip(ends, ("shared", "encoder.final_layer_norm"), strict=True))
    for layer in range(layers):
        for module, named in _MODULES.items():
            names[f"{_LAYERS[naming]}.{layer}.{named[llama]}"] = f"encoder.block.{layer}.layer.{module}"
    return names


def source_names(info: TextEncoderInfo, names: Collection[str]) -> dict[str, str]:
    """transformers module path -> module path in the file, prefix included."""
    return _source_names(info.naming, info.prefix, info.layers, names)


def _source_names(naming: str, prefix: str, layers: int, names: Collection[str]) -> dict[str, str]:
    pairs = module_names(layers, LLAMA if naming == LLAMA else OFFICIAL)
    if naming not in (TRANSFORMERS, STACK):
        return {hf: prefix + theirs for theirs, hf in pairs.items()}
    above = "encoder." if naming == STACK else ""
    source = {hf: prefix + hf.removeprefix(above) for hf in pairs.values()}
    if source["shared"] + ".weight" not in names:
        source["shared"] = prefix + _EMBEDDING_ALIAS.removeprefix(above)
    return source


def text_encoder_info(stored: StoredModel) -> TextEncoderInfo:
    """Recognises an encoder by its names and reads its sizes off its shapes.

    Raises:
        ValueError: not a umT5 encoder, or one that lacks tensors.
    """
    names, shapes, path = stored.tensors, stored.shapes, stored.label
    found = [(prefix, naming) for naming, marker in _MARKERS.items() for prefix in prefixes(names, (marker,))]
    if not found:
        raise ValueError(f"{path} is {describe_tensors(names)}; expected {EXPECTED}")
    prefix, naming = found[0]
    stem = f"{prefix}{_LAYERS[naming]}."
    numbers = {name[len(stem) :].partition(".")[0] for name in names if name.startswith(stem)}
    layers = len({number for number in numbers if number.isdecimal()})
    spiece = next((name for name in names if name.split(".")[-1] == SPIECE_MODEL), None)
    source = _source_names(naming, prefix, layers, names)
    missing = sorted(module for module in source.values() if f"{module}.weight" not in names)
    if missing:
        # Only umT5 has one in every layer.
        is_t5 = all(module.endswith("attn_rel_b") for module in missing)
        kind = "a T5 text encoder, not a umT5," if is_t5 else describe_tensors(names)
        raise ValueError(
            f"{path} is {kind} that lacks {len(missing)} tensors ({', '.join(missing[:3])}); expected {EXPECTED}, "
            "all of its files"
        )
    if spiece is not None and (len(shapes[spiece]) != 1 or not 0 < shapes[spiece][0] <= MAX_SPIECE_BYTES):
        raise ValueError(
            f"{path} has tensor {spiece} of shape {list(shapes[spiece])}; it must be a list of at most "
            f"{MAX_SPIECE_BYTES} bytes"
        )

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
    return TextEncoderInfo(dim, vocab, layers, heads, inner // heads, ffn_dim, buckets, prefix, naming, spiece)


def module_shapes(info: TextEncoderInfo) -> dict[str, tuple[int, ...]]:
    """transformers module path -> shape of its weight, for an encoder of known sizes."""
    inner = info.heads * info.head_dim
    wide, narrow = (inner, info.dim), (info.dim, inner)
    leaves: dict[str, tuple[int, ...]] = {"q": wide, "k": wide, "v": wide, "o": narrow}
    leaves |= {"wi_0": (info.ffn_dim, info.dim), "wi_1": (info.ffn_dim, info.dim)}
    leaves |= {"wo": (info.dim, info.ffn_dim), "shared": (info.vocab, info.dim)}
    leaves |= {"relative_attention_bias": (info.buckets, info.heads), "layer_norm": (info.dim,)}
    leaves["final_layer_norm"] = (info.dim,)
    return {module: leaves[module.rpartition(".")[2]] for module in module_names(info.layers).values()}


def encoder_weights(stored: StoredModel, modules: Collection[str]) -> dict[str, StoredTensor]:
    """`weight` of each module by tensor name, with its scale. Raises ValueError if one cannot be read as floats."""
    owners = frozenset(modules)
    # Some formats put more behind the weight's name: q.weight.absmax.
    own = {name: name for name in stored.tensors if owners & {name.rsplit(".", 1)[0], name.rsplit(".", 2)[0]}}
    try:
        return stored.weights(own)
    except ValueError as error:
        raise ValueError(f"{stored.label}: {error}") from error


def check_text_encoder_files(files: Sequence[str | Path], tokenizer_files: Sequence[str | Path]) -> TextEncoderInfo:
    """Reads headers only: is this a complete umT5 encoder, and is there a tokenizer for it.

    Args:
        files: one file, or every shard of one; JSON files among them are ignored.
        tokenizer_files: tokenizer.json or a SentencePiece model; unused if the encoder carries its own.
    Raises:
        ValueError: naming the file, what it is, and what was expected.
    """
    stored = open_model(files, EXPECTED)
    info = text_encoder_info(stored)
    source = source_names(info, stored.tensors)
    # Before the shapes: packed formats have others.
    weights = encoder_weights(stored, source.values())
    for module, shape in module_shapes(info).items():
        check_shape(f"{source[module]}.weight", weights[f"{source[module]}.weight"].shape, shape, stored.label)
    if info.spiece_model is None and not (stored.gguf is not None and carries_tokenizer(stored.gguf)):
        choose_tokenizer_file(tokenizer_files, stored.label)
    return info
