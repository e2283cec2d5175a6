"""The transformer on many clips at once, for training: the same modules and parameters, and the same results.

Shapes: B = clips, S = tokens of a clip, R = text rows, H = heads, D = channels per head, C = dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...wan.model.config import TEXT_LEN, WanConfig
from ...wan.model.ops import Rope
from ...wan.transformer.context import Context
from ...wan.transformer.cross_attention import CrossAttention
from ...wan.transformer.self_attention import local_attention
from ...wan.transformer.transformer import WanModel


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """[B, S, H, D] and twice [B, K, H, D] -> [B, S, H, D]; bias: [B, 1, 1, K], added to the logits."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


class BatchedCrossAttention(CrossAttention):
    """Attends to the text's rows and to one zero row that stands for all the others.

    A clip's rows beyond its caption are zero, so their keys and values are equal: n equal keys weigh as much as one
    whose logit is larger by log(n).
    """

    bias: Tensor | None = None
    """[B, 1, 1, R]: see `text_bias`."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.bias is not None
        return _attention(q, k, v, self.bias.to(q.dtype).expand(-1, -1, q.shape[1], -1))


class BatchedModel(WanModel):
    """`WanModel` whose tensors have one more dimension in front."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        for block in self.blocks:
            block.cross_attn = BatchedCrossAttention(config)
            block.self_attn.attention = local_attention(_attention)

    def velocity(self, tokens: Tensor, timestep: Tensor, text: Tensor, lengths: Tensor, rope: Rope) -> Tensor:
        """One evaluation.

        Args:
            tokens: [B, S, 4 * in_dim].
            timestep: [B], 0 to 1000.
            text: [B, R, text_dim], zero from `lengths` on; the last row is zero for every clip.
            lengths: [B], rows of each caption, below R.
        Returns:
            [B, S, 4 * out_dim].
        """
        bias = text_bias(lengths, text.shape[1])
        for block in self.blocks:
            block.cross_attn.bias = bias
        # The index broadcasts over tokens, and the residual over clips: nothing is written out per token.
        rows = torch.arange(len(timestep), device=tokens.device)[:, None]
        return self(tokens, timestep, Context(text, keep=False), rope, rows)


def text_bias(lengths: Tensor, rows: int) -> Tensor:
    """What is added to the logits of text rows [B, 1, 1, rows]: the last row stands for all that are padding."""
    index = torch.arange(rows, device=lengths.device)
    bias = torch.where(index < lengths[:, None], 0.0, -math.inf)
    padding = (TEXT_LEN - lengths).float().log()
    return torch.where(index == rows - 1, padding[:, None], bias)[:, None, None]


def initialise(model: WanModel, seed: int) -> None:
    """Random weights; the blocks and the head begin as identity and zero (Peebles & Xie, 2022, arXiv 2212.09748)."""
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(float(name.endswith("weight")))
            elif name.endswith("bias") or name.endswith("modulation") or name.startswith(("head.", "time_projection")):
                parameter.zero_()
            else:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
