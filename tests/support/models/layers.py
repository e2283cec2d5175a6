"""Self-attention layers for an exchange to work on, and a plain form of the kernel that writes heads."""

from __future__ import annotations

import ctypes
import dataclasses
from types import SimpleNamespace

import torch
from torch import Tensor
from wan_pack.wan.model.attention import attention
from wan_pack.wan.model.codes import CodesAttention, HeadCodes, Heads
from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.model.eight_bits import E4M3
from wan_pack.wan.model.ops import PLAIN, HeadPlaces, Rope
from wan_pack.wan.transformer.self_attention import SelfAttention


class Projected:
    """A layer whose q, k and v are known, [S, H, D] each."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._qkv = q, k, v
        _, self.num_heads, self.head_dim = q.shape
        self.q = SimpleNamespace(compute_dtype=q.dtype)
        self.norm_q = SimpleNamespace(weight=q)

    def queries_keys_values(self, x: object, rope: object, rotate: object) -> tuple[Tensor, Tensor, Tensor]:
        assert rotate is not PLAIN.rotate_codes
        return self._qkv


def random_layer(*, heads: int, channels: int, seed: int = 0) -> SelfAttention:
    """The same on every rank."""
    dim = heads * channels
    layer = SelfAttention(
        WanConfig(dim=dim, ffn_dim=8, num_heads=heads, num_layers=1, in_dim=4, out_dim=4, text_dim=8, freq_dim=8)
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return layer


def write_heads(
    x: Tensor, weight: Tensor | None, rope: Rope | None, head_dim: int, out: Tensor, places: HeadPlaces
) -> Tensor | None:
    """`Ops.write_heads`, head by head."""
    if out.is_cuda:
        # Its memory is out of the processor's reach; places are in `out` itself there.
        host = out.cpu()
        table = HeadPlaces(places.table.cpu())
        given = (None if weight is None else weight.cpu(), None if rope is None else tuple(part.cpu() for part in rope))
        scale = write_heads(x.cpu(), *given, head_dim, host, table)
        out.copy_(host)
        return None if scale is None else scale.to(out.device)
    scale = None
    if weight is None:
        heads = x.unflatten(-1, (-1, head_dim))
    elif out.dtype == E4M3:
        heads, scale = PLAIN.rotate_codes(x, weight, rope, head_dim)
    else:
        heads = PLAIN.rotate(x, weight, rope, head_dim)
    for head, (start, step) in zip(heads.unbind(1), places.table.t().tolist(), strict=True):
        # As on a GPU, the place may lie in other memory than `out`.
        length = (head.shape[0] - 1) * step + head_dim
        memory = (ctypes.c_char * (length * out.itemsize)).from_address(out.data_ptr() + start * out.itemsize)
        torch.frombuffer(memory, dtype=out.dtype).as_strided(head.shape, (step, 1)).copy_(head)
    return scale


WRITING = dataclasses.replace(PLAIN, write_heads=write_heads)


@CodesAttention
def attention_on_codes(q: Heads, k: Heads, v: Heads) -> Tensor:
    """Of what the codes stand for."""
    assert all(isinstance(x, HeadCodes) and x.codes.dtype == E4M3 for x in (q, k, v))
    return attention(*(codes.float() * scale[:, None] for codes, scale in (q, k, v)))
