"""Heads in 8 bits: nothing saturates, and loud channels do no harm."""

from __future__ import annotations

import torch
from layers import random_layer
from torch import Tensor
from torch._dynamo.utils import counters
from wan_pack.wan.model.attention import attention
from wan_pack.wan.model.codes import HeadCodes, hadamard, quantise_heads
from wan_pack.wan.model.ops import PLAIN
from wan_pack.wan.model.rope import rope_table

HEADS, SIZE, TOKENS = 4, 64, 256


def values(heads: HeadCodes) -> Tensor:
    return heads.codes.float() * heads.scale[:, None]


def queries_keys(weight: Tensor) -> list[tuple[Tensor, HeadCodes]]:
    """q and k of random projections, exact and as codes."""
    generator = torch.Generator().manual_seed(0)
    rope = rope_table((4, 8, 8), SIZE)
    found = []
    for _ in range(2):
        rows = torch.randn(TOKENS, HEADS * SIZE, generator=generator)
        found.append((PLAIN.rotate(rows, weight, rope, SIZE), PLAIN.rotate_codes(rows, weight, rope, SIZE)))
    return found


def test_products_of_queries_and_keys_stay_what_they_are():
    """Up to rounding to 8 bits: an error of a few per cent of what two vectors' lengths allow."""
    (q, q8), (k, k8) = queries_keys(torch.rand(HEADS * SIZE, generator=torch.Generator().manual_seed(1)) + 0.5)
    exact, rounded = (torch.einsum("qhd,khd->hqk", a, b) for a, b in ((q, k), (values(q8), values(k8))))
    assert ((rounded - exact).norm() / exact.norm()).item() < 0.05
    # They are not the values themselves.
    assert ((values(q8) - q * SIZE**0.5).norm() / q.norm()).item() > 1


def test_loud_channels_cost_no_more_than_others():
    """Three times less error than with the largest magnitude's scale and no rotation."""
    weight = torch.ones(HEADS * SIZE)
    weight[:: SIZE // 2] = 20.0
    (q, q8), (k, k8) = queries_keys(weight)
    v = torch.randn(TOKENS, HEADS, SIZE, generator=torch.Generator().manual_seed(2))
    exact = attention(q, k, v)
    spread, plain = (
        (attention(values(a), values(b), v) - exact).norm() / exact.norm()
        for a, b in ((q8, k8), (quantise_heads(q), quantise_heads(k)))
    )
    assert spread < 0.1 and plain > 2.5 * spread, (spread, plain)


def test_no_row_is_too_long_for_its_scale():
    """The worst one: all of its length in one head, along a column of the matrix, becomes the largest code."""
    for weight in (torch.ones(HEADS * SIZE), torch.full((HEADS * SIZE,), 1e-30), torch.zeros(HEADS * SIZE)):
        row = torch.zeros(1, HEADS, SIZE)
        row[0, 1] = hadamard(SIZE, row.device, row.dtype)[:, 3]
        codes = PLAIN.rotate_codes(row.flatten(1), weight, rope_table((1, 1, 1), SIZE), SIZE)
        assert codes.codes.float().isfinite().all() and (codes.scale > 0).all()
        if weight[0] == 1:
            assert codes.codes[0, 1, 3] == 448
            # As many bits are left for what is sixty times smaller.
            assert codes.codes.float().abs().amax() / 448 * codes.scale[1] * 448 >= 0.999 * (HEADS * SIZE) ** 0.5


def test_the_matrix_keeps_lengths_and_angles():
    matrix = hadamard(128, torch.device("cpu"), torch.float32)
    assert torch.equal(matrix @ matrix.t(), 128 * torch.eye(128))
    # A head of equal values is spread too.
    assert (torch.ones(128) @ matrix).abs().max() <= 16


def test_codes_are_traced_without_a_break():
    """With the matrix, which is made once and kept where nothing is compiled."""
    layer = random_layer(heads=4, channels=16)
    x, rope = torch.randn(6, 64), rope_table((1, 2, 3), 16)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(layer.queries_keys_values, backend="eager")(x, rope, PLAIN.rotate_codes)
    for heads, expected in zip(compiled[:2], layer.queries_keys_values(x, rope, PLAIN.rotate_codes), strict=False):
        assert torch.equal(heads.codes.float(), expected.codes.float()) and torch.equal(heads.scale, expected.scale)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    torch._dynamo.reset()
