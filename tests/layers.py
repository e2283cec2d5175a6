"""Self-attention layers for an exchange to work on, and a plain form of the kernel that writes heads."""

from __future__ import annotations

import ctypes
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from wan_pack.wan.config import WanConfig
from wan_pack.wan.model import SelfAttention
from wan_pack.wan.ops import PLAIN, HeadPlaces, Rope


@dataclass(frozen=True, slots=True)
class Projected:
    """A layer whose q, k and v are known, [S, H, D] each."""

    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def num_heads(self) -> int:
        return self.q.shape[1]

    @property
    def head_dim(self) -> int:
        return self.q.shape[2]

    def queries_keys_values(self, *_: object) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


def random_layer(*, heads: int, channels: int, seed: int = 0) -> SelfAttention:
    """The same on every rank."""
    dim = heads * channels
    layer = SelfAttention(
        WanConfig(dim=dim, ffn_dim=8, num_heads=heads, num_layers=1, in_dim=4, out_dim=4, text_dim=8, freq_dim=8)
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def write_heads(
    x: Tensor, weight: Tensor | None, rope: Rope | None, head_dim: int, out: Tensor, places: HeadPlaces
) -> None:
    """`Ops.write_heads`, head by head."""
    heads = x.unflatten(-1, (-1, head_dim)) if weight is None else PLAIN.rotate(x, weight, rope, head_dim)
    for head, (start, step) in zip(heads.unbind(1), places.table.t().tolist(), strict=True):
        # As on a GPU, the place may lie in other memory than `out`.
        length = (head.shape[0] - 1) * step + head_dim
        memory = (ctypes.c_char * (length * out.itemsize)).from_address(out.data_ptr() + start * out.itemsize)
        torch.frombuffer(memory, dtype=out.dtype).as_strided(head.shape, (step, 1)).copy_(head)


WRITING = dataclasses.replace(PLAIN, write_heads=write_heads)
