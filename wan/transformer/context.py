"""What a video's tokens attend to, and what is derived of it once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.config import TEXT_LEN
from .part import Split, bytes_of

KeysValues = tuple[Tensor, Tensor]
"""[R, H, D] each."""


@dataclass(slots=True)
class Context:
    """One prompt, or the pictures, for one expert: the same at every step, and so are its keys and values."""

    tokens: Tensor
    """[R, channels]: text (see `pad_text`), or CLIP features of pictures."""
    keep: bool = True
    """Keep what is derived from `tokens` between steps; costs 2 * blocks * R * C elements."""
    _embedded: Tensor | None = None
    _keys_values: dict[nn.Module, KeysValues] = field(default_factory=dict)

    def on_rank(self, split: Split, length: int) -> Context:
        return self

    def on_device(self, device: torch.device) -> Context:
        return Context(self.tokens.to(device), self.keep)

    def for_expert(self, *, keep: bool) -> Context:
        return Context(self.tokens, keep)

    def device_bytes(self) -> int:
        return bytes_of(self.tokens, self._embedded, *chain.from_iterable(self._keys_values.values()))

    def embedded(self, embedding: nn.Module) -> Tensor:
        """[R, C], as `embedding` makes it of the tokens."""
        if self._embedded is not None:
            return self._embedded
        embedded: Tensor = embedding(self.tokens)
        if self.keep:
            self._embedded = embedded
        return embedded

    def keys_values(self, layer: nn.Module, make: Callable[[], KeysValues]) -> KeysValues:
        """Those of a cross-attention; `make` computes them."""
        found = self._keys_values.get(layer)
        if found is None:
            found = make()
            if self.keep:
                self._keys_values[layer] = found
        return found


Attended = tuple[Context, Tensor]
"""A context, and its tokens as the model embeds them, [R, C]."""


def pad_text(tokens: Tensor) -> Tensor:
    """[n, text_dim] -> [512, text_dim]: zeros at the end, or cut. The model attends to them too."""
    # Fewer than none are rows that are cut.
    return F.pad(tokens, (0, 0, 0, TEXT_LEN - tokens.shape[0]))
