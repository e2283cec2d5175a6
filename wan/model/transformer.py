"""The Wan video diffusion transformer, with the official parameter names and dtype policy.

Shapes: S = tokens held here, H = heads, D = channels per head, C = dim, R = text tokens (512).
Everything is unbatched: a video is one sample. There is no distributed code: `forward` takes any run of tokens
with its rotary table, and whatever joins tokens goes through `SelfAttention.attention`, which may be replaced.

Matrix products run in their layer's `compute_dtype`; the residual stream, modulation, normalisation, time path and head
are float32 (`parameter_dtype`), as in the official code under autocast. The arithmetic around a block's products is its
`ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention, attention
from .codes import CodesAttention, HeadCodes
from .config import EPS, TEXT_LEN, WanConfig
from .latent_space import PATCH_SIZE
from .linear import E4M3, FP8_PRODUCTS, Fp8Tokens, Fp8Weight, Linear, LinearInput
from .ops import PLAIN, Ops, Rope, rms_norm

Which = Tensor | None
"""Which of the timesteps each token is at; None: there is one."""
H = TypeVar("H", Tensor, HeadCodes)
Rotate = Callable[[Tensor, Tensor, Rope, int], H]
"""`Ops.rotate` or `Ops.rotate_codes`."""


def parameter_dtype(name: str, compute: torch.dtype) -> torch.dtype:
    """Dtype a parameter is kept in: `compute` for the large matrix products, float32 for the rest."""
    head, _, tail = name.partition(".")
    fp32 = head in ("time_embedding", "time_projection", "head") or "norm" in tail or name.endswith("modulation")
    return torch.float32 if fp32 else compute


class RMSNorm(nn.Module):
    """The weight [C] of a root mean square norm over all heads together, which `Ops` computes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class PatchEmbedding(nn.Module):
    """The 1x2x2 convolution with stride 1x2x2, written as a linear layer per token."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, in_dim, *PATCH_SIZE))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        # Tokens have their channel fastest (patch.py); the convolution has it slowest.
        weight = self.weight.permute(0, 2, 3, 4, 1).flatten(1)
        return F.linear(tokens.to(weight.dtype), weight, self.bias)


class SelfAttention(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.q = Linear(config.dim, config.dim)
        self.k = Linear(config.dim, config.dim)
        self.v = Linear(config.dim, config.dim)
        self.o = Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim)
        self.norm_k = RMSNorm(config.dim)
        self.attention: TokenAttention = local_attention(attention)
        """Sequence parallelism puts its own here."""

    def queries_keys_values(self, x: LinearInput, rope: Rope, rotate: Rotate[H]) -> tuple[H, H, Tensor]:
        """x: [S, C] -> q, k, v, [S, H, D] each, q and k as `rotate` gives them, in the dtype of the matrix products."""
        q = rotate(self.q(x), self.norm_q.weight, rope, self.head_dim)
        k = rotate(self.k(x), self.norm_k.weight, rope, self.head_dim)
        return q, k, self.v(x).unflatten(-1, (-1, self.head_dim))


TokenAttention = Callable[[SelfAttention, LinearInput, Rope, Ops], Tensor]
"""(the layer, x [S, C], rope, ops) -> [S, H, D]: the layer's attention up to its last projection.

It is given what the projections start from, so that it may send some of them while it computes the others.
"""


def local_attention(kernel: Attention) -> TokenAttention:
    """Attention between the tokens that are here."""

    def attend(layer: SelfAttention, x: LinearInput, rope: Rope, ops: Ops) -> Tensor:
        if not isinstance(kernel, CodesAttention):
            return kernel(*layer.queries_keys_values(x, rope, ops.rotate))
        q, k, v = layer.queries_keys_values(x, rope, ops.rotate_codes)
        return kernel(q, k, ops.quantise_heads(v))

    return attend


class CrossAttention(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q = Linear(config.dim, config.dim)
        self.k = Linear(config.dim, config.dim)
        self.v = Linear(config.dim, config.dim)
        self.o = Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim)
        self.norm_k = RMSNorm(config.dim)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context: [R, C] -> k, v: [R, H, D]."""
        v = self.v(context).unflatten(-1, (-1, self.head_dim))
        k = rms_norm(self.k(context), self.norm_k.weight).unflatten(-1, (-1, self.head_dim))
        return k, v

    def forward(self, x: LinearInput, k: Tensor, v: Tensor, ops: Ops) -> Tensor:
        """x: [S, C] -> [S, C]. All 512 text tokens are attended, padding included, as the model was trained."""
        q = ops.rms_norm(self.q(x), self.norm_q.weight).unflatten(-1, (-1, self.head_dim))
        return self.o(ops.cast(attention(q, k, v).flatten(-2), self.o.input_dtype))


class WanBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward around a float32 residual.

    `attention_inputs`, `SelfAttention.queries_keys_values` and `attention_outputs` hold all the arithmetic and no
    communication: they are what may be compiled. `forward` is the glue.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(config.dim, eps=EPS)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), Linear(config.ffn_dim, config.dim)
        )
        self.ffn_chunk: int | None = None
        """Tokens per feed-forward call; None: all at once."""
        self.ops: Ops = PLAIN

    def attention_inputs(self, x: Tensor, e: Tensor, which: Which) -> LinearInput:
        """x: [S, C] and e: [n, 6, C], float32; which: see `WanModel.forward` -> [S, C], what `self_attn` projects."""
        shift, scale, *_ = _per_token(self.modulation + e, which)
        return self.ops.norm(x, 1 + scale, shift, self.self_attn.q.input_dtype)

    def attention_outputs(self, x: Tensor, y: Tensor, e: Tensor, which: Which, k: Tensor, v: Tensor) -> Tensor:
        """The rest of the block. y: self-attention's [S, H, D]; k, v: the text's [R, H, D]. Returns [S, C]."""
        _, _, gate, shift, scale, ffn_gate = _per_token(self.modulation + e, which)
        attn, cross, norm3, ops = self.self_attn, self.cross_attn, self.norm3, self.ops
        y = attn.o(ops.cast(y.flatten(-2), attn.o.input_dtype))
        x, normed = ops.add_norm(x, y, gate, norm3.weight, norm3.bias, cross.q.input_dtype)
        x, normed = ops.add_norm(x, cross(normed, k, v, ops), None, 1 + scale, shift, self._ffn_layers()[0].input_dtype)
        return ops.add(x, self._feed_forward(normed), ffn_gate)

    def _ffn_layers(self) -> tuple[Linear, Linear]:
        up, _, down = self.ffn
        assert isinstance(up, Linear) and isinstance(down, Linear), self.ffn
        return up, down

    def _feed_forward(self, x: LinearInput) -> Tensor:
        up, down = self._ffn_layers()
        if self.ffn_chunk is None:
            return down(self.ops.gelu_linear(up, x, down.input_dtype))
        parts: Sequence[LinearInput]
        if isinstance(x, Fp8Tokens):
            parts = [Fp8Tokens(*part) for part in zip(*(tensor.split(self.ffn_chunk) for tensor in x), strict=True)]
        else:
            parts = x.split(self.ffn_chunk)
        return torch.cat([down(self.ops.gelu_linear(up, part, down.input_dtype)) for part in parts])

    def forward(
        self, x: Tensor, e: Tensor, which: Which, rope: Rope, context: Tensor, cached: KeysValues | None
    ) -> BlockOutput:
        y = self.self_attn.attention(self.self_attn, self.attention_inputs(x, e, which), rope, self.ops)
        context_kv = self.cross_attn.keys_values(context) if cached is None else cached
        return self.attention_outputs(x, y, e, which, *context_kv), context_kv


KeysValues = tuple[Tensor, Tensor]
BlockOutput = tuple[Tensor, KeysValues]


def _per_token(e: Tensor, which: Which) -> tuple[Tensor, ...]:
    """[n, k, C] -> k tensors that broadcast over tokens: [1, C], or [S, C] where tokens differ."""
    return e.unbind(1) if which is None else tuple(part[which] for part in e.unbind(1))


class Head(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.dim = config.dim
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))
        self.head = Linear(config.dim, config.out_dim * PATCH_SIZE[1] * PATCH_SIZE[2])

    def forward(self, x: Tensor, e: Tensor, which: Which) -> Tensor:
        """x: [S, C], e: [n, C], float32 -> [S, 4 * out_dim]."""
        shift, scale = _per_token(self.modulation + e[:, None], which)
        return self.head(F.layer_norm(x, (self.dim,), eps=EPS) * (1 + scale) + shift)


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


class WanModel(nn.Module):
    """Predicts the velocity (noise minus video) of latent tokens. Parameter names are the official ones."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = PatchEmbedding(config.in_dim, dim)
        self.text_embedding = nn.Sequential(Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear(config.freq_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        # torch's list does not say of which modules it is.
        self.blocks: Sequence[WanBlock] = nn.ModuleList(WanBlock(config) for _ in range(config.num_layers))  # type: ignore[assignment]
        self.head = Head(config)

    def forward(self, tokens: Tensor, timestep: Tensor, text: TextContext, rope: Rope, which: Which = None) -> Tensor:
        """One evaluation.

        Args:
            tokens: [S, 4 * in_dim], float32 (patch.py's order).
            timestep: [n] different ones, float32, 0 to 1000; n is 1 unless `which` is given.
            text: the prompt.
            rope: cos, sin of these tokens, each [S, D/2].
            which: [S], int64, the index into `timestep` of each token: what depends on the timestep is computed for
                the few different ones, not for every token.
        Returns:
            velocity [S, 4 * out_dim], float32.
        """
        e = self.time_embedding(timestep_embedding(timestep, self.config.freq_dim))
        e6 = self.time_projection(e).unflatten(-1, (6, -1))
        context = self.text_embedding(text.tokens) if text.embedded is None else text.embedded
        if text.keep:
            text.embedded = context
        x = self.patch_embedding(tokens).float()
        for i, block in enumerate(self.blocks):
            x, keys_values = block(x, e6, which, rope, context, text.keys_values.get(i))
            if text.keep:
                text.keys_values[i] = keys_values
        return self.head(x, e, which)


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """[n] -> [n, dim] float32: cosines, then sines. Angles in float64: float32 is off by 1e-4 at t near 1000."""
    half = dim // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angle = torch.outer(timestep.double(), frequency)
    return torch.cat((angle.cos(), angle.sin()), dim=1).float()


def meta_model(
    config: WanConfig,
    compute: torch.dtype,
    fp8: Mapping[str, Fp8Weight] | None = None,
    *,
    fp8_products: bool = False,
) -> WanModel:
    """The model without memory, each parameter in its dtype (`parameter_dtype`), frozen.

    Args:
        fp8: the weights that stay fp8, by parameter name.
        fp8_products: the layers of `FP8_PRODUCTS`, whose weights are in `fp8` as e4m3, multiply fp8 by fp8.
    """
    with torch.device("meta"):
        model = WanModel(config)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(parameter_dtype(name, compute))
        parameter.requires_grad_(False)
    for name, stored in (fp8 or {}).items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, Linear), name
        layer.keep_fp8(stored, parameter_dtype(name, compute))
    if fp8_products:
        for layer in (block.get_submodule(name) for block in model.blocks for name in FP8_PRODUCTS):
            assert isinstance(layer, Linear) and layer.weight.dtype == E4M3, layer
            layer.fp8_product = True
    return model.eval()
