"""The text encoder: a small umT5 with a vocabulary of its own, trained together with the transformers (dit.py)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ...wan.text.text_encoder import DEFAULT_NEGATIVE_PROMPT, TextEncoder, load_text_encoder
from ...wan.text.tokenizer import Tokenizer
from .captions import sentences
from .sizes import Sizes
from .trained_files import NAMES, place, write

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

VOCABULARY = 300
"""Room for every word of the captions as a piece of its own, and for single letters."""
NO_TEXT = ("", DEFAULT_NEGATIVE_PROMPT)
"""What the unconditional pass is given: nothing, or the official negative prompt, of which this vocabulary knows
little but commas."""


def train_spiece() -> bytes:
    """A SentencePiece model of the captions with umT5's special tokens: <pad> 0, </s> 1, <unk> 2."""
    import sentencepiece

    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(), model_writer=writer, vocab_size=VOCABULARY, model_type="bpe",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return writer.getvalue()


def build(sizes: Sizes, spiece: bytes, seed: int = 0) -> TextEncoder:
    """Random weights."""
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = Tokenizer(spiece, label="the demo's tokenizer")
    config = UMT5Config(
        vocab_size=tokenizer.vocab, d_model=sizes.text_dim, d_kv=32, d_ff=2 * sizes.text_dim,
        num_layers=sizes.text_layers, num_heads=sizes.text_dim // 32, feed_forward_proj="gated-gelu", dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1,
        attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UMT5EncoderModel(config)
    return TextEncoder(model, tokenizer)


def load(folder: Path, device: torch.device) -> TextEncoder:
    """The one that was trained."""
    encoder = load_text_encoder([place(folder, NAMES.text_encoder)], dtype=torch.float32, device=device)
    # Read, they are equal; training must change them as one.
    encoder.model.encoder.embed_tokens.weight = encoder.model.shared.weight
    return encoder


def save(folder: Path, model: UMT5EncoderModel, spiece: bytes) -> None:
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "encoder.embed_tokens.weight"}
    spiece_model = torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    write(place(folder, NAMES.text_encoder), {**tensors, "spiece_model": spiece_model})


def longest(tokenizer: Tokenizer) -> int:
    """Rows that hold every caption, with a zero row behind it: a multiple of 8, which attention kernels like."""
    most = max(len(tokenizer(text)) for text in (*NO_TEXT, *sentences()))
    return 8 * -(-(most + 4) // 8)


def pad_ids(ids: Sequence[Sequence[int]], rows: int) -> Tensor:
    """Token ids of each text -> [len(ids), rows], zero behind them."""
    assert max(map(len, ids)) < rows, f"a text has {max(map(len, ids))} tokens; there are {rows} rows"
    return torch.stack([F.pad(torch.tensor(each), (0, rows - len(each))) for each in ids])


def encode(model: UMT5EncoderModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Padded ids [B, R] -> rows [B, R, dim], zero behind each text, and the texts' lengths [B]."""
    mask = ids != 0
    rows = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    return rows * mask[..., None], mask.sum(1)
