"""Tensor names and sizes of umT5 encoders, and the check of their files' headers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files.headers import brief
from ..files.identify import describe_tensors
from ..files.model_index import ModelIndex, read_index
from ..files.quant_formats import READABLE
from .gguf_tokenizer import carries_tokenizer
from .tokenizer_bounds import MAX_SPIECE_BYTES
from .tokenizer_files import choose_tokenizer_file

EXPECTED = (
    "a umT5 text encoder (umt5_xxl_fp16.safetensors, umt5_xxl_fp8_e4m3fn_scaled.safetensors, "
    "models_t5_umt5-xxl-enc-bf16.pth, umt5-xxl-encoder-Q8_0.gguf)"
)
SPIECE_MODEL = "spiece_model"
"""A uint8 tensor holding the SentencePiece model, in the files made for ComfyUI."""


PREFIXES = ("", "model.", "transformer.", "text_encoders.umt5xxl.transformer.")
"""In front of every name of the encoder, by who saved the file."""

SCALES = ("scale_weight", "weight_scale")
"""Beside a quantised `weight`: multiply by it, one number or one per output row."""

OFFICIAL, TRANSFORMERS, LLAMA = "official", "transformers", "llama.cpp"
"""Who named the tensors; ComfyUI keeps transformers' names, GGUF files have llama.cpp's."""

_MARKERS = {
    OFFICIAL: "blocks.0.pos_embedding.embedding.weight",
    TRANSFORMERS: "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    LLAMA: "enc.blk.0.attn_rel_b.weight",
}
_LAYERS = {OFFICIAL: "blocks", TRANSFORMERS: "encoder.block", LLAMA: "enc.blk"}
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
    naming: str
    """OFFICIAL, TRANSFORMERS or LLAMA."""
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


def llama_module_names(layers: int) -> dict[str, str]:
    """llama.cpp's module path -> transformers module path, for every `weight` of an encoder."""
    names = {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"}
    for layer in range(layers):
        llama, hf = f"enc.blk.{layer}", f"encoder.block.{layer}.layer"
        names[f"{llama}.attn_norm"] = f"{hf}.0.layer_norm"
        names |= {f"{llama}.attn_{part}": f"{hf}.0.SelfAttention.{part}" for part in "qkvo"}
        names[f"{llama}.attn_rel_b"] = f"{hf}.0.SelfAttention.relative_attention_bias"
        names[f"{llama}.ffn_norm"] = f"{hf}.1.layer_norm"
        for theirs, ours in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")):
            names[f"{llama}.ffn_{theirs}"] = f"{hf}.1.DenseReluDense.{ours}"
    return names


def hf_to_official(name: str, layers: int) -> str:
    """A transformers tensor name -> the official one. KeyError for a name the encoder does not have."""
    module, _, leaf = name.rpartition(".")
    return {theirs: ours for ours, theirs in module_names(layers).items()}[module] + "." + leaf


def source_names(info: TextEncoderInfo, names: Collection[str]) -> dict[str, str]:
    """transformers module path -> module path in the file, prefix included."""
    pairs = llama_module_names(info.layers) if info.naming == LLAMA else module_names(info.layers)
    source = {hf: info.prefix + (hf if info.naming == TRANSFORMERS else theirs) for theirs, hf in pairs.items()}
    if source["shared"] + ".weight" not in names and info.naming == TRANSFORMERS:
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
    found = [(prefix, naming) for prefix in PREFIXES for naming, marker in _MARKERS.items() if prefix + marker in names]
    if not found:
        raise ValueError(f"{path} is {describe_tensors(names)}; expected {EXPECTED}")
    prefix, naming = found[0]
    stem = f"{prefix}{_LAYERS[naming]}."
    numbers = {name[len(stem) :].partition(".")[0] for name in names if name.startswith(stem)}
    layers = len({number for number in numbers if number.isdecimal()})
    spiece = next((name for name in names if name.split(".")[-1] == SPIECE_MODEL), None)
    info = TextEncoderInfo(None, None, layers, None, None, None, None, prefix, naming, spiece)
    source = source_names(info, names)
    missing = sorted(module for module in source.values() if f"{module}.weight" not in names)
    if missing:
        # Only umT5 has one in every layer.
        is_t5 = all(module.endswith("attn_rel_b") for module in missing)
        kind = "a T5 text encoder, not a umT5," if is_t5 else describe_tensors(names)
        raise ValueError(
            f"{path} is {kind} that lacks {len(missing)} tensors ({', '.join(missing[:3])}); expected {EXPECTED}, "
            "all of its files"
        )
    if shapes is None:
        return info
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
    leaves = {"q": wide, "k": wide, "v": wide, "o": narrow, "wi_0": (info.ffn_dim, info.dim)}
    leaves |= {"wi_1": (info.ffn_dim, info.dim), "wo": (info.dim, info.ffn_dim), "shared": (info.vocab, info.dim)}
    leaves |= {"relative_attention_bias": (info.buckets, info.heads), "layer_norm": (info.dim,)}
    leaves["final_layer_norm"] = (info.dim,)
    return {module: leaves[module.rpartition(".")[2]] for module in module_names(info.layers).values()}


def check_weights(index: ModelIndex, modules: Collection[str]) -> dict[str, str]:
    """Which numbers the quantised ones among an encoder's weights are multiplied by: weight -> name of its scale.

    Args:
        index: with shapes and dtypes.
        modules: as named in the files.
    Raises:
        ValueError: a weight is stored in a way that cannot be turned back into floats.
    """
    assert index.tensors is not None
    # GGUF: its reader refuses what it cannot unpack.
    if index.gguf is not None:
        return {}
    scales = {}
    for module in modules:
        name = f"{module}.weight"
        weight, stored = index.tensors[name], index.formats.get(module)
        if stored is not None and stored not in READABLE:
            raise ValueError(
                f"{index.label} stores {name} as {brief(stored)}, a quantised format that is not supported; "
                f"expected float32, float16, bfloat16 or {', '.join(READABLE)}"
            )
        scale = next((f"{module}.{end}" for end in SCALES if f"{module}.{end}" in index.tensors), None)
        if weight.dtype not in _WEIGHT_DTYPES or (weight.dtype == "I8" and scale is None):
            raise ValueError(
                f"{index.label} stores {name} as {weight.dtype} in a quantised format that is not supported; "
                "expected float32, float16, bfloat16, float8 or float8 with one scale per tensor or row"
            )
        if scale is None:
            continue
        info = index.tensors[scale]
        # One number, or one per row. Anything larger scales blocks (mxfp8, nvfp4).
        blocks = any(size != 1 for size in info.shape[1:]) or info.shape[:1] not in ((), (1,), weight.shape[:1])
        if info.dtype not in _SCALE_DTYPES or blocks:
            raise ValueError(
                f"{index.label} scales {name} in blocks ({info.dtype}, shape {list(info.shape)}), which is not "
                "supported; expected one scale per tensor or row"
            )
        scales[name] = scale
    return scales


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
        source = source_names(info, index.names)
        # Before the shapes: packed formats have others.
        check_weights(index, source.values())
        for module, shape in module_shapes(info).items():
            found = index.tensors[f"{source[module]}.weight"].shape
            if found != shape:
                raise ValueError(
                    f"{index.label}: tensor {source[module]}.weight has shape {list(found)}; the sizes of its other "
                    f"tensors call for {list(shape)}"
                )
    if info.spiece_model is None and not (index.gguf is not None and carries_tokenizer(index.gguf)):
        choose_tokenizer_file(tokenizer_files, index.label)
    return info
