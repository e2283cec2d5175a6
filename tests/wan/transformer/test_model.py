"""The transformer: sizes, precision policy, and the parts that golden cases do not single out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tiny import GRID, TINY, random_weights
from wan_pack.benchmarks.released_sizes import WAN_CONFIGS
from wan_pack.wan.model.attention import attention
from wan_pack.wan.model.config import config_from_shapes
from wan_pack.wan.model.ops import PLAIN
from wan_pack.wan.model.patch import patchify, token_grid, unpatchify
from wan_pack.wan.model.rope import apply_rope, rope_table
from wan_pack.wan.transformer.block import Block, Stream
from wan_pack.wan.transformer.context import Context, pad_text
from wan_pack.wan.transformer.transformer import WanModel, meta_model, parameter_dtype, timestep_embedding


def tiny_model(dtype: torch.dtype = torch.float32) -> WanModel:
    model = meta_model(TINY, dtype)
    weights = {name: t.to(parameter_dtype(name, dtype)) for name, t in random_weights().items()}
    model.load_state_dict(weights, assign=True)
    return model


def evaluate(model: WanModel, text: Context) -> torch.Tensor:
    tokens = torch.randn(45, 64, generator=torch.Generator().manual_seed(3))
    return model(tokens, torch.tensor([700.0]), text, rope_table(GRID, TINY.head_dim))


def prompt() -> torch.Tensor:
    return pad_text(torch.randn(9, TINY.text_dim, generator=torch.Generator().manual_seed(4)))


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("t2v-A14B", 1095, 14_288_491_584),
        ("i2v-A14B", 1095, 14_288_901_184),
        ("ti2v-5B", 825, 4_999_787_712),
        ("t2v-1.3B", 825, 1_418_996_800),
    ],
)
def test_released_models_have_their_official_size(name: str, tensors: int, parameters: int):
    model = meta_model(WAN_CONFIGS[name], torch.bfloat16)
    assert len(model.state_dict()) == tensors
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_config_is_read_off_the_shapes():
    for config in WAN_CONFIGS.values():
        model = meta_model(config, torch.bfloat16)
        assert config_from_shapes({n: tuple(p.shape) for n, p in model.named_parameters()}) == config


def test_precision_policy():
    """Large matrix products in the compute dtype; time path, modulation, norms and head in float32."""
    dtypes = {name: p.dtype for name, p in meta_model(TINY, torch.bfloat16).named_parameters()}
    fp32 = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert {"time_embedding.0.weight", "time_projection.1.bias", "head.head.weight", "head.modulation"} <= fp32
    assert {f"blocks.0.{x}" for x in ("modulation", "norm3.weight", "self_attn.norm_q.weight")} <= fp32
    assert {dtypes[f"blocks.1.{x}.weight"] for x in ("self_attn.q", "cross_attn.o", "ffn.0")} == {torch.bfloat16}
    assert dtypes["patch_embedding.weight"] == dtypes["text_embedding.2.weight"] == torch.bfloat16


def test_output_and_residual_stay_float32_under_bf16():
    out = evaluate(tiny_model(torch.bfloat16), Context(prompt()))
    exact = evaluate(tiny_model(), Context(prompt()))
    assert out.dtype == torch.float32
    error = ((out - exact).norm() / exact.norm()).item()
    assert 1e-6 < error < 2e-2, "bf16 rounds, and no more than it should"


def test_a_sum_left_to_the_next_block_has_the_bits_of_one_made_at_once(monkeypatch: pytest.MonkeyPatch):
    """The norm makes it: the residual is read and written once less."""
    model, sums = tiny_model(torch.bfloat16), []
    counting = dataclasses.replace(PLAIN, add=lambda x, y, gate: (sums.append(1), PLAIN.add(x, y, gate))[1])
    for block in model.running_order:
        block.ops = counting
    left = evaluate(model, Context(prompt()))
    # Behind the last block.
    assert len(sums) == 1
    through = Block.through
    monkeypatch.setattr(Block, "through", lambda self, *given: Stream(through(self, *given).sum(counting)))
    at_once = evaluate(model, Context(prompt()))
    assert len(sums) == 1 + TINY.num_layers and torch.equal(left, at_once)


def test_what_is_normed_is_float32_from_the_first_block_on():
    model, dtypes = tiny_model(torch.bfloat16), set()
    counting = dataclasses.replace(
        PLAIN, norm=lambda x, *given: (dtypes.add(x.dtype), PLAIN.norm(x, *given))[1],
        add_norm=lambda x, y, *given: (dtypes.add(x.dtype), PLAIN.add_norm(x, y, *given))[1],
    )  # fmt: skip
    for block in model.running_order:
        block.ops = counting
    evaluate(model, Context(prompt()))
    assert dtypes == {torch.float32}


def test_kept_text_changes_nothing():
    model = tiny_model()
    kept = Context(prompt())
    first, second = evaluate(model, kept), evaluate(model, kept)
    assert len(kept._keys_values) == TINY.num_layers
    fresh = Context(prompt(), keep=False)
    torch.testing.assert_close(evaluate(model, fresh), first)
    torch.testing.assert_close(second, first)
    assert not fresh._keys_values
    assert fresh._embedded is None


def test_chunked_feed_forward_is_exact_and_smaller():
    model = tiny_model()
    plain = evaluate(model, Context(prompt()))
    sizes = []
    for block in model.blocks:
        block.ffn_chunk = 7
        block.ffn[0].register_forward_hook(lambda module, args, out: sizes.append(out.shape[0]))
    torch.testing.assert_close(evaluate(model, Context(prompt())), plain)
    assert max(sizes) == 7
    assert sum(sizes) == 45 * TINY.num_layers


def test_patch_embedding_is_the_convolution():
    model = tiny_model()
    latents = torch.randn(16, 3, 6, 10)
    embedding = model.patch_embedding
    expected = F.conv3d(latents[None], embedding.weight, embedding.bias, stride=(1, 2, 2))[0].flatten(1).T
    torch.testing.assert_close(embedding(patchify(latents)), expected, rtol=1e-4, atol=1e-4)


def test_patches_round_trip():
    latents = torch.randn(16, 3, 6, 10)
    assert torch.equal(unpatchify(patchify(latents), token_grid((16, 3, 6, 10))), latents)
    with pytest.raises(ValueError, match="5 x 10"):
        token_grid((16, 3, 5, 10))


def test_rope_of_a_part_is_a_part_of_the_rope():
    whole = rope_table(GRID, 8)
    part = rope_table(GRID, 8, start=30, stop=48)
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[30:], b[:15])
    # Padding past the end is left as it is.
    x = torch.randn(18, 2, 8)
    assert torch.equal(apply_rope(x, *part)[15:], x[15:])


def test_rope_keeps_lengths_and_depends_on_distance_only():
    cos, sin = rope_table((6, 1, 1), 8)
    q, k = torch.randn(8).expand(6, 1, 8), torch.randn(8).expand(6, 1, 8)
    rq, rk = apply_rope(q, cos, sin)[:, 0], apply_rope(k, cos, sin)[:, 0]
    torch.testing.assert_close(rq.norm(dim=-1), q[:, 0].norm(dim=-1))
    torch.testing.assert_close(rq[1] @ rk[3], rq[2] @ rk[4])


def test_text_is_padded_with_zero_rows_or_cut():
    assert pad_text(torch.ones(3, 4)).sum() == 12
    long = torch.arange(600.0)[:, None].expand(600, 4)
    assert torch.equal(pad_text(long), long[:512]) and torch.equal(pad_text(long[:512]), long[:512])


def test_timestep_embedding_is_exact_between_whole_steps():
    """937.5 and 833.33 are told apart from 936 and 832, which bf16 timesteps would make of them."""
    a, b = timestep_embedding(torch.tensor([937.5, 936.0]), 256)
    assert (a - b).abs().max() > 0.5
    assert timestep_embedding(torch.tensor([0.0]), 8).tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]


def test_attention_without_heads_is_empty():
    empty = torch.empty(5, 0, 8)
    assert attention(empty, empty, empty).shape == (5, 0, 8)
