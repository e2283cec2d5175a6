"""A tiny umT5 encoder under its several names, and a tokenizer for it."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mount import GOLDEN
from safetensors.torch import load_file
from torch import Tensor
from wan_pack.wan.text.t5_keys import LLAMA, module_names

MODEL = GOLDEN / "t5_encoder" / "text_encoder" / "model.safetensors"
"""Official names, two layers."""
LAYERS = 2
SENTENCES = (
    "a cat walks on the grass, realistic style",
    "two boxers fight on a spotlit stage",
    "the camera follows a white vintage car up a steep dirt road",
    "summer beach vacation style, a white cat wearing sunglasses sits on a surfboard",
)


@functools.cache
def train_spiece() -> bytes:
    """A SentencePiece model with umT5's ids for pad, end and unknown."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        vocab_size=90,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()


def hf_weights() -> dict[str, Tensor]:
    """The golden model under transformers' names."""
    names = module_names(LAYERS)
    official = load_file(MODEL)
    return {f"{names[name.removesuffix('.weight')]}.weight": tensor for name, tensor in official.items()}


def wide_hf_weights() -> dict[str, Tensor]:
    """Random weights whose rows are whole blocks of 32, as GGUF's types need, under transformers' names."""
    generator = torch.Generator().manual_seed(0)
    dim, ffn_dim = 64, 128
    shapes = {"shared": (300, dim), "wi_0": (ffn_dim, dim), "wi_1": (ffn_dim, dim), "wo": (dim, ffn_dim)}
    tensors = {}
    for module in module_names(LAYERS).values():
        leaf = module.rpartition(".")[2]
        shape = (32, 4) if leaf == "relative_attention_bias" else (dim,) if "norm" in leaf else shapes.get(leaf)
        tensors[f"{module}.weight"] = torch.randn(shape or (dim, dim), generator=generator) * 0.1
    return tensors


def write_gguf(
    path: Path, tensors: Mapping[str, Tensor], kind: str, metadata: Mapping[str, Any], *, renamed: bool = True
) -> dict[str, Tensor]:
    """A text encoder as llama.cpp's converter names and stores it; matrices in type `kind`.

    Args:
        tensors: under transformers' names.
        renamed: to llama.cpp's; others keep transformers'.
    Returns:
        what the stored values stand for, under the same names.
    """
    import gguf

    names = {hf: llama for llama, hf in module_names(LAYERS, LLAMA).items()}
    writer = gguf.GGUFWriter(path, "t5encoder")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        else:
            (writer.add_string if isinstance(value, str) else writer.add_array)(key, value)
    meaning = {}
    for name, tensor in tensors.items():
        exact = tensor.dim() == 1 or "relative_attention_bias" in name
        stored_as = gguf.GGMLQuantizationType["F32" if exact else kind]
        data = gguf.quants.quantize(tensor.numpy(), stored_as)
        named = f"{names[name.removesuffix('.weight')]}.weight" if renamed else name
        writer.add_tensor(named, data, raw_dtype=stored_as)
        meaning[name] = torch.from_numpy(gguf.quants.dequantize(data, stored_as))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meaning


def gguf_tokenizer(spiece: bytes) -> dict[str, Any]:
    """A SentencePiece model as the metadata that llama.cpp's converter makes of it."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_proto=spiece)
    ids = range(pieces.get_piece_size())
    normalizer = dict(_fields(dict(_fields(spiece))[3]))
    padding = 300 - len(ids)
    return {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": [pieces.id_to_piece(i) for i in ids] + [f"[PAD{i}]" for i in range(padding)],
        "tokenizer.ggml.scores": [pieces.get_score(i) for i in ids] + [-10000.0] * padding,
        "tokenizer.ggml.token_type": [
            2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1 for i in ids
        ]
        + [5] * padding,
        "tokenizer.ggml.add_space_prefix": bool(normalizer.get(3, 1)),
        "tokenizer.ggml.remove_extra_whitespaces": bool(normalizer.get(4, 1)),
        "tokenizer.ggml.precompiled_charsmap": list(normalizer[2]),
    }


def _fields(message: bytes) -> list[tuple[int, Any]]:
    """Number and value of each field of a protobuf message."""
    fields, at = [], 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            value |= (message[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if message[at - 1] < 128:
                return value

    while at < len(message):
        key = varint()
        size = {0: 0, 1: 8, 5: 4}.get(key & 7)
        value: Any = varint() if key & 7 in (0, 2) else None
        if size != 0:
            size = value if size is None else size
            value, at = message[at : at + size], at + size
        fields.append((key >> 3, value))
    return fields
