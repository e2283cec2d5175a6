"""What a video's tokens attend to, and what is derived of it once."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from ..model.config import TEXT_LEN
from .cross_attention import KeysValues


@dataclass(slots=True)
class TextContext:
    """One prompt for one expert. The keys and values of its cross-attention are the same at every step."""

    tokens: Tensor
    """[R, text_dim]: see `pad_text`."""
    keep: bool = True
    """Keep what is derived from `tokens` between steps; costs 2 * layers * R * C elements."""
    embedded: Tensor | None = None
    keys_values: dict[int, KeysValues] = field(default_factory=dict)


def pad_text(tokens: Tensor) -> Tensor:
    """[n, text_dim] -> [512, text_dim]: zeros at the end, or cut. The model attends to them too."""
    tokens = tokens[:TEXT_LEN]
    return F.pad(tokens, (0, 0, 0, TEXT_LEN - tokens.shape[0]))
