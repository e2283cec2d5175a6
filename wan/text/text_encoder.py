"""Prompts -> text embeddings: transformers' umT5 encoder, loaded from any file users have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..files.module_weights import fill
from ..files.stored_model import StoredModel, open_model
from .gguf_tokenizer import carries_tokenizer, sentencepiece_model
from .t5_keys import EXPECTED, TextEncoderInfo, encoder_weights, source_names, text_encoder_info
from .tokenizer import Tokenizer
from .tokenizer_files import choose_tokenizer_file

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

DEFAULT_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""The official one; the models were tuned with it."""


@dataclass(frozen=True)
class TextEncoder:
    """An encoder and its tokenizer."""

    model: UMT5EncoderModel
    tokenizer: Tokenizer

    @property
    def dim(self) -> int:
        """Channels per token."""
        return self.model.config.d_model

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """One tensor [n, dim] per prompt, n <= 512 tokens, without padding; the model's dtype and device."""
        return [self.encode_ids(self.tokenizer(prompt)) for prompt in prompts]

    def encode_ids(self, ids: Sequence[int]) -> Tensor:
        """Token ids -> [len(ids), dim]."""
        return encode_ids(self.model, ids)


@torch.no_grad()
def encode_ids(model: UMT5EncoderModel, ids: Sequence[int]) -> Tensor:
    """Token ids -> [len(ids), dim]."""
    # Alone and unpadded: padding is masked as a key and what becomes of it is dropped, so it would change nothing.
    batch = torch.tensor([list(ids)], dtype=torch.long, device=model.device)
    return model(input_ids=batch, attention_mask=torch.ones_like(batch)).last_hidden_state[0]


def load_text_encoder(
    files: Sequence[str | Path],
    tokenizer_files: Sequence[str | Path] = (),
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    check: Callable[[], None] = lambda: None,
) -> TextEncoder:
    """Loads a umT5 encoder of any size under official, transformers' or llama.cpp's names, quantised ones included.

    Args:
        files: one .safetensors, .pth or .gguf, or every shard.
        tokenizer_files: tokenizer.json or a SentencePiece model; unused if the encoder carries a tokenizer.
        dtype: of weights and embeddings.
        check: called before each tensor that is read and each layer that is computed; what it raises ends that.
    Raises:
        ValueError: naming the file, what it is, and what was expected.
    """
    stored = open_model(files, EXPECTED)
    info = text_encoder_info(stored)
    tokenizer = _load_tokenizer(stored, info.spiece_model, tokenizer_files)
    if tokenizer.vocab > info.vocab:
        raise ValueError(
            f"{tokenizer.label} has {tokenizer.vocab} tokens, but {stored.label} knows {info.vocab}; "
            "they belong to different models"
        )
    model = load_umt5(stored, dtype=dtype, device=device, check=check)
    for layer in model.encoder.block:
        layer.register_forward_pre_hook(lambda *_: check())
    return TextEncoder(model, tokenizer)


def load_umt5(
    stored: StoredModel,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    check: Callable[[], None] = lambda: None,
) -> UMT5EncoderModel:
    """The encoder alone, without a tokenizer. `check` is called before each tensor.

    Raises ValueError as `load_text_encoder` does.
    """
    info = text_encoder_info(stored)
    modules = source_names(info, stored.tensors)
    weights = encoder_weights(stored, modules.values())
    modules["encoder.embed_tokens"] = modules["shared"]
    model = _build(info)
    source = {name: f"{modules[name.removesuffix('.weight')]}.weight" for name in model.state_dict()}
    fill(model, weights, source, stored.label, dtype=dtype, device=device, check=check)
    return model


def _load_tokenizer(stored: StoredModel, spiece_model: str | None, files: Sequence[str | Path]) -> Tokenizer:
    # What the encoder carries is surely its own; a file beside it may be another model's.
    gguf = stored.gguf
    if gguf is not None and carries_tokenizer(gguf):
        return Tokenizer(sentencepiece_model(gguf), label=f"{stored.label} (its metadata)")
    if spiece_model is None:
        return Tokenizer(choose_tokenizer_file(files, stored.label))
    return Tokenizer(stored.read_bytes(spiece_model), label=f"{stored.label} ({spiece_model})")


def _build(info: TextEncoderInfo) -> UMT5EncoderModel:
    # On first use: transformers takes seconds to import, and a job with embeddings never needs it.
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=info.vocab,
        d_model=info.dim,
        d_kv=info.head_dim,
        d_ff=info.ffn_dim,
        num_layers=info.layers,
        num_heads=info.heads,
        relative_attention_num_buckets=info.buckets,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
        pad_token_id=0,
        eos_token_id=1,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        return UMT5EncoderModel(config)
