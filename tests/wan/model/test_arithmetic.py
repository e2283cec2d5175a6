"""Positions, norms and codes beside their definitions, written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from wan_pack.wan.model.codes import hadamard
from wan_pack.wan.model.eight_bits import E4M3, KeptWeight, quantise_rows, regular_hadamard
from wan_pack.wan.model.linear import Linear, cast_tokens
from wan_pack.wan.model.ops import PLAIN, HeadPlaces
from wan_pack.wan.model.rope import apply_rope, rope_table
from wan_pack.wan.transformer.transformer import timestep_embedding

BF16 = torch.bfloat16


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("head_dim", "pairs"), [(128, (22, 21, 21)), (8, (2, 1, 1)), (4, (2, 0, 0))])
def test_a_tokens_angles_are_those_of_its_frame_row_and_column(head_dim: int, pairs: tuple[int, ...]):
    """Exact to float32 for the last of a thousand frames: angles of float32 would be 6e-5 off there."""
    grid = (1000, 3, 5)
    start = 999 * 15 + 11
    cos, sin = rope_table(grid, head_dim, start=start, stop=start + 2)
    for index, place in enumerate(((999, 2, 1), (999, 2, 2))):
        angles = [at * 10000.0 ** (-i / n) for at, n in zip(place, pairs, strict=True) for i in range(n)]
        for table, function in ((cos, math.cos), (sin, math.sin)):
            assert table.dtype == torch.float32
            assert table[index].tolist() == pytest.approx([function(angle) for angle in angles], abs=1e-7)


def test_pairs_of_neighbours_turn_by_their_angle():
    x, angle = noise(3, 2, 4), noise(3, 2, seed=1)
    turned = torch.view_as_complex(x.view(3, 2, 2, 2)) * torch.polar(torch.ones(3, 1, 2), angle[:, None])
    torch.testing.assert_close(apply_rope(x, angle.cos(), angle.sin()), torch.view_as_real(turned).flatten(-2))


def test_a_timestep_is_told_to_float32():
    """Whole cosines before sines; angles of float32 would be 6e-5 off."""
    (made,) = timestep_embedding(torch.tensor([937.5]), 256)
    angles = [937.5 * 10000.0 ** (-i / 128) for i in range(128)]
    expected = [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
    assert made.dtype == torch.float32 and made.tolist() == pytest.approx(expected, abs=1e-7)


def test_what_is_normed_in_bf16_is_rounded_once():
    x, weight, rope = noise(6, 64).to(BF16), noise(64, seed=1) + 2, rope_table((1, 2, 3), 16)
    normed = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-6).sqrt() * weight
    assert torch.equal(PLAIN.rms_norm(x, weight), normed.to(BF16))
    heads = apply_rope(F.rms_norm(x.float(), (64,), weight, 1e-6).unflatten(1, (4, 16)), *rope)
    turned = PLAIN.rotate(x, weight, rope, 16)
    assert turned.dtype == BF16 and torch.equal(turned, heads.to(BF16))
    codes, scale = PLAIN.rotate_codes(x, weight, rope, 16)
    spread = (heads.to(BF16) @ hadamard(16, x.device, BF16)).float()
    assert scale.dtype == torch.float32
    assert torch.equal(codes.float(), (spread / (4 * scale[:, None])).to(E4M3).float())


def test_norms_add_and_weigh_as_they_are_told():
    x, y, gate, weight, bias = (noise(5, 8, seed=seed) for seed in range(5))
    centred = x.double() - x.double().mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    for shared in (True, False):
        w, b, g = (part[:1] if shared else part for part in (weight, bias, gate))
        torch.testing.assert_close(PLAIN.norm(x, w, b, torch.float32), (normed * w + b).float())
        total, made = PLAIN.add_norm(x, y, g, w, b, BF16)
        assert torch.equal(total, x + y * g) and torch.equal(PLAIN.add(x, y, g), total)
        assert torch.equal(made, PLAIN.norm(total, w, b, BF16)) and made.dtype == BF16
    torch.testing.assert_close(PLAIN.norm(x, weight[0], bias[0], torch.float32), (normed * weight[0] + bias[0]).float())
    assert torch.equal(PLAIN.add_norm(x, y, None, weight, bias, BF16)[0], x + y)


def test_only_a_layer_with_memory_is_filled(monkeypatch: pytest.MonkeyPatch):
    """Torch would go through all layers of an empty model for nothing."""
    filled: list[str] = []
    fill = torch.nn.init.kaiming_uniform_

    def note(weight: torch.Tensor, **how: Any) -> None:
        filled.append(weight.device.type)
        fill(weight, **how)

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", note)
    with torch.device("meta"):
        Linear(4, 3)
    assert Linear(4, 3).weight.abs().max() <= 4**-0.5
    assert filled == ["cpu"]


def test_products_that_are_bent_are_bent_by_the_tanh_form():
    linear = Linear(4, 3)
    x = noise(5, 4)
    y = linear(x).double()
    expected = 0.5 * y * (1 + ((2 / math.pi) ** 0.5 * (y + 0.044715 * y**3)).tanh())
    torch.testing.assert_close(PLAIN.gelu_linear(linear, x, torch.float32), expected.float())


def test_heads_have_their_places_counted_from_the_memory_that_is_written():
    """Two runs of two tokens: of three heads of four, and of one that has other heads beside it."""
    memory = torch.zeros(100)
    one, other = memory[10:34].view(2, 3, 4), memory[40:80].view(2, 5, 4)[:, 2:3]
    table = HeadPlaces.of([one, other], memory[2:]).table
    assert table.tolist() == [[8, 12, 16, 46], [12, 12, 12, 20]]
    assert table.dtype == torch.int64 and table.is_contiguous()


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_codes_of_half_precision_are_scaled_in_float32(dtype: torch.dtype):
    x = noise(4, 32).to(dtype)
    made, (codes, scale) = cast_tokens(x, E4M3), quantise_rows(x.float(), E4M3)
    assert made.scale.dtype == torch.float32
    assert torch.equal(made.codes.float(), codes.float()) and torch.equal(made.scale, scale)
    assert cast_tokens(x, torch.float32).dtype == torch.float32


def test_rows_fill_the_range_of_their_type():
    values = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]])
    for dtype, largest in ((torch.int8, 127), (E4M3, 448), (torch.float8_e5m2, 57344)):
        codes, scale = quantise_rows(values, dtype)
        assert codes.dtype == dtype and codes.float().tolist()[0][1] == -largest
        assert scale.tolist() == [[pytest.approx(2 / largest)], [1.0]] and not codes[1].float().any()


@pytest.mark.parametrize(("dtype", "least", "largest"), [(torch.int8, -128.5, 127.5), (E4M3, -464.0, 464.0)])
def test_a_scale_stays_while_no_value_is_more_than_half_a_step_beyond(dtype, least: float, largest: float):
    kept = torch.full((4, 1), 0.5)
    over = 1.001
    rows = torch.tensor([[least, largest], [least * over, 0], [0, largest * over], [1, 0]]) * kept
    scale = quantise_rows(rows, dtype, kept)[1]
    assert (scale == kept).flatten().tolist() == [True, False, False, True]


def test_rotations_of_groups_are_their_own_inverse():
    for size in (4, 16, 64):
        matrix = regular_hadamard(size, torch.device("cpu"), torch.float32)
        torch.testing.assert_close(matrix @ matrix, torch.eye(size))
        assert torch.equal(matrix, matrix.T) and matrix.abs().unique().tolist() == [size**-0.5]
        assert matrix.sum(1).unique().tolist() == [1.0]


def test_a_layer_holds_loras_of_a_lower_rank_and_nothing_else_that_differs():
    layer = KeptWeight(E4M3, scaled=True, rotated_by=16, lora_rank=8)
    for rank, held in ((0, True), (8, True), (9, False)):
        assert layer.holds(KeptWeight(E4M3, scaled=True, rotated_by=16, lora_rank=rank)) is held
    for other in (
        KeptWeight(torch.int8, scaled=True, rotated_by=16),
        KeptWeight(E4M3, scaled=False, rotated_by=16),
        KeptWeight(E4M3, scaled=True),
    ):
        assert not layer.holds(other)
    assert (KeptWeight(torch.int8, True).storage, KeptWeight(torch.float8_e5m2, True).storage) == (
        E4M3, torch.float8_e5m2,
    )  # fmt: skip
