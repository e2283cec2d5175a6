"""Attention of a video's tokens to what they are made from.

Shapes as in transformer.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from ..model.attention import attention
from ..model.config import WanConfig
from ..model.linear import Linear, LinearInput
from ..model.ops import Ops, rms_norm
from .context import Attended, KeysValues
from .self_attention import RMSNorm


class CrossAttention(nn.Module):
    """To the text and, in a model with an image branch, to pictures, whose keys and values have layers of their own."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q = Linear(config.dim, config.dim)
        self.k = Linear(config.dim, config.dim)
        self.v = Linear(config.dim, config.dim)
        self.o = Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim)
        self.norm_k = RMSNorm(config.dim)
        if config.image_branch:
            self.k_img = Linear(config.dim, config.dim)
            self.v_img = Linear(config.dim, config.dim)
            self.norm_k_img = RMSNorm(config.dim)

    def keys_values(self, attended: Sequence[Attended]) -> tuple[KeysValues, ...]:
        """attended: the text and, if there is one, the picture -> the keys and values of each."""
        (text, rows), *pictures = attended
        found = [text.keys_values(self, partial(self._project, rows, self.k, self.norm_k, self.v))]
        for picture, features in pictures:
            make = partial(self._project, features, self.k_img, self.norm_k_img, self.v_img)
            found.append(picture.keys_values(self, make))
        return tuple(found)

    def _project(self, rows: Tensor, k: Linear, norm_k: RMSNorm, v: Linear) -> KeysValues:
        """rows: [R, C] -> k, v: [R, H, D]."""
        values = v(rows).unflatten(-1, (-1, self.head_dim))
        return rms_norm(k(rows), norm_k.weight).unflatten(-1, (-1, self.head_dim)), values

    def forward(self, x: LinearInput, keys_values: Sequence[KeysValues], ops: Ops) -> Tensor:
        """x: [S, C] -> [S, C]. All 512 text tokens are attended, padding included, as the model was trained; what each
        of several contexts gives is added up."""
        q = ops.rms_norm(self.q(x), self.norm_q.weight).unflatten(-1, (-1, self.head_dim))
        y = self._attend(q, *keys_values[0])
        for k, v in keys_values[1:]:
            y = y + self._attend(q, k, v)
        return self.o(ops.cast(y.flatten(-2), self.o.input_dtype))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [S, H, D]; k, v: [R, H, D] -> [S, H, D]."""
        return attention(q, k, v)
