"""LoHa, LoKr, DoRA and OFT: merged row by row they are what their formulas, written out, give."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_formats import write_scaled
from lora_families import TARGETS
from ranks import run_ranks
from safetensors.torch import save_file
from tiny import TINY, random_weights, write_official
from torch import Tensor
from torch.testing import assert_close
from wan_pack.wan.checkpoint import weights
from wan_pack.wan.checkpoint.checkpoint import Checkpoint
from wan_pack.wan.lora import merging
from wan_pack.wan.lora.lora import Lora
from wan_pack.wan.lora.merging import merge

MODULE = "blocks.0.ffn.0"
WEIGHT = f"{MODULE}.weight"
OUT, IN = TARGETS[WEIGHT]
RANK, ALPHA = 4, 2.0
STRENGTH = 0.5

WIDE = dataclasses.replace(TINY, dim=128, num_heads=1)
"""Of a single file, which says no other number of heads."""

Made = tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]
"""A module's tensors, and what they make of its weight at `STRENGTH`."""


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed)) / 4


def loha() -> Made:
    a1, b1, a2, b2 = rand(OUT, RANK), rand(RANK, IN), rand(OUT, RANK, seed=1), rand(RANK, IN, seed=1)
    tensors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(ALPHA)}
    return tensors, lambda w: w + STRENGTH * ALPHA / RANK * (a1 @ b1) * (a2 @ b2)


def lokr_whole() -> Made:
    """Both factors whole: alpha has no effect."""
    w1, w2 = rand(4, 8), rand(OUT // 4, IN // 8)
    return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(7.0)}, lambda w: w + STRENGTH * torch.kron(w1, w2)


def lokr_factored() -> Made:
    w1, a, b = rand(4, 4), rand(OUT // 4, RANK), rand(RANK, IN // 4)
    tensors = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(ALPHA)}
    return tensors, lambda w: w + STRENGTH * ALPHA / RANK * torch.kron(w1, a @ b)


def lokr_all_factored() -> Made:
    """Of two ranks the second factor's counts, as in ComfyUI."""
    c, d, a, b = rand(8, 2), rand(2, 2), rand(OUT // 8, RANK), rand(RANK, IN // 2)
    tensors = {"lokr_w1_a": c, "lokr_w1_b": d, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(ALPHA)}
    return tensors, lambda w: w + STRENGTH * ALPHA / RANK * torch.kron(c @ d, a @ b)


def dora(shape: tuple[int, ...] = (OUT, 1), name: str = "dora_scale") -> Made:
    up, down, lengths = rand(OUT, RANK), rand(RANK, IN), rand(OUT).abs() + 1

    def made(w: Tensor) -> Tensor:
        changed = w + ALPHA / RANK * up @ down
        return w + STRENGTH * (torch.diag(lengths / changed.square().sum(1).sqrt()) @ changed - w)

    tensors = {"lora_up.weight": up, "lora_down.weight": down, name: lengths.view(shape), "alpha": torch.tensor(ALPHA)}
    return tensors, made


def dora_of(change: Made) -> Made:
    tensors, changing = change
    lengths = rand(OUT).abs() + 1

    def made(w: Tensor) -> Tensor:
        changed = w + (changing(w) - w) / STRENGTH
        return w + STRENGTH * (lengths[:, None] * changed / changed.norm(dim=1, keepdim=True) - w)

    return tensors | {"dora_scale": lengths[:, None]}, made


def oft(constraint: float = 0.0, rescaled: bool = False) -> Made:
    size = 16
    blocks, rescale = rand(OUT // size, size, size), rand(OUT, 1).abs() + 0.5
    tensors = {"oft_blocks": blocks, "alpha": torch.tensor(constraint)} | ({"rescale": rescale} if rescaled else {})
    skew = blocks - blocks.transpose(1, 2)
    # LyCORIS bounds the norm of all of them by the constraint times the number of rows.
    if constraint and skew.norm() > constraint * OUT:
        skew = skew * (constraint * OUT / skew.norm())
    one = torch.eye(size).expand_as(skew)
    turn = torch.block_diag(*((one + skew) @ torch.linalg.inv(one - skew)).transpose(1, 2))
    assert_close(turn @ turn.T, torch.eye(OUT), rtol=0, atol=1e-4)
    return tensors, lambda w: w + STRENGTH * ((rescale if rescaled else 1) * (turn @ w) - w)


CASES: dict[str, Callable[[], Made]] = {
    "LoHa": loha, "LoKr, whole": lokr_whole, "LoKr, factored": lokr_factored, "LoKr, all factored": lokr_all_factored,
    "DoRA": dora, "DoRA as PEFT has it": lambda: dora((OUT,), "lora_magnitude_vector.weight"),
    "DoRA with an adapter's name": lambda: dora((OUT,), "lora_magnitude_vector.default.weight"),
    "DoRA of LoKr": lambda: dora_of(lokr_factored()), "DoRA of bounded OFT": lambda: dora_of(oft(0.01)),
    "OFT": oft, "OFT, bounded": lambda: oft(0.01), "OFT, loosely": lambda: oft(9.0),
    "OFT, rescaled": lambda: oft(rescaled=True),
}  # fmt: skip


def write(path: Path, tensors: dict[str, Tensor], module: str = MODULE) -> Path:
    save_file({f"lycoris_{module.replace('.', '_')}.{role}": t.contiguous() for role, t in tensors.items()}, path)
    return path


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranges", [1, 3, 7])
def test_ranges_of_rows_make_what_the_formula_says(
    tmp_path: Path, case: str, ranges: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(merging, "CHUNK_BYTES", 5 * 4 * IN)
    tensors, formula = CASES[case]()
    lora = Lora(write(tmp_path / "l.safetensors", tensors), STRENGTH, TARGETS)
    weight = random_weights()[WEIGHT]
    made, first = weight.clone(), 0
    for rows in made.chunk(ranges):
        merge([lora], WEIGHT, rows, first, lambda start, count: weight[start : start + count].clone())
        first += rows.shape[0]
    assert_close(made, formula(weight), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(made, weight, atol=1e-2)
    assert lora.report().endswith("strength 0.5: applied 1")


def test_changes_that_depend_on_the_weight_see_it_without_the_others(tmp_path: Path):
    made = [dora(), oft(), loha()]
    loras = [Lora(write(tmp_path / f"{i}.safetensors", t), STRENGTH, TARGETS) for i, (t, _) in enumerate(made)]
    weight = random_weights()[WEIGHT]
    expected = weight + sum(formula(weight) - weight for _, formula in made)
    for order in (loras, loras[::-1]):
        rows = weight.clone()
        merge(order, WEIGHT, rows, 0)
        assert_close(rows, expected, rtol=1e-5, atol=1e-5)


def test_only_rows_of_the_blocks_that_are_turned_are_read(tmp_path: Path):
    """Of 16 rows each; those of other ranks too."""
    lora, weight = Lora(write(tmp_path / "l.safetensors", oft()[0]), STRENGTH, TARGETS), random_weights()[WEIGHT]
    for first, count, read in ((20, 5, (16, 16)), (30, 4, (16, 32)), (48, 16, (48, 16)), (79, 1, (64, 16))):
        asked: list[tuple[int, int]] = []

        def rows(start: int, number: int, asked: list[tuple[int, int]] = asked) -> Tensor:
            asked.append((start, number))
            return weight[start : start + number].clone()

        merge([lora], WEIGHT, weight[first : first + count].clone(), first, rows)
        assert asked == [read]


@pytest.mark.parametrize("case", ["DoRA", "OFT"])
def test_a_weight_in_fewer_bits_is_rounded_once(tmp_path: Path, case: str):
    lora = Lora(write(tmp_path / "l.safetensors", CASES[case]()[0]), STRENGTH, TARGETS)
    short = random_weights()[WEIGHT].bfloat16()
    whole = short.float()
    merge([lora], WEIGHT, short, 0)
    merge([lora], WEIGHT, whole, 0)
    assert torch.equal(short, whole.bfloat16())


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("stored", ["fp32", "fp8"])
def test_every_family_under_fsdp(tmp_path: Path, world: int, stored: str):
    """Shards end in the middle of OFT's blocks."""
    (tmp_path / "model").mkdir()
    if stored == "fp32":
        write_official(tmp_path / "model", random_weights(), TINY)
    else:
        path = tmp_path / "model" / "m.safetensors"
        write_scaled(path, random_weights(WIDE), torch.float8_e4m3fn, scale="weight_scale", per_row=True)
    # OFT alone takes any width.
    cases = ("OFT", "DoRA of LoKr", "LoHa") if stored == "fp32" else ("OFT",)
    files = [
        (str(write(tmp_path / f"{i}.safetensors", CASES[case]()[0], f"blocks.{i % 2}.ffn.0")), STRENGTH)
        for i, case in enumerate(cases)
    ]
    results = run_ranks("merged_shards", world, folder=str(tmp_path / "model"), loras=files, mixed_precision="fp32")
    assert any(result[WEIGHT] % 16 for result in results)


def test_peft_scales_whole_factors_by_its_settings(tmp_path: Path):
    """Which LyCORIS, whose files hold an alpha, does not."""
    w1, w2 = rand(4, 8), rand(OUT // 4, IN // 8)
    path = tmp_path / "adapter_model.safetensors"
    save_file({f"base_model.model.{MODULE}.lokr_w1": w1, f"base_model.model.{MODULE}.lokr_w2": w2}, path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", "r": 8, "alpha": 2}))
    weight = random_weights()[WEIGHT]
    rows = weight.clone()
    merge([Lora(path, 1.0, TARGETS)], WEIGHT, rows, 0)
    assert_close(rows, weight + 2 / 8 * torch.kron(w1, w2))
    # Without an alpha the factors are all that there is, however it would be divided.
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", "r": 8, "use_rslora": True}))
    rows = weight.clone()
    merge([Lora(path, 1.0, TARGETS)], WEIGHT, rows, 0)
    assert_close(rows, weight + torch.kron(w1, w2))
    # One rank for all is not known where modules have ranks of their own.
    for settings in ({"alpha": 2}, {"alpha": 2, "r": 8, "rank_pattern": {"ffn.0": 4}}, {"alpha": 2, "r": 0}):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", **settings}))
        with pytest.raises(ValueError, match=r"adapter_config\.json has an alpha for .*ffn\.0 but no r"):
            Lora(path, 1.0, TARGETS)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"hada_w1_a": rand(OUT, 4), "hada_w1_b": rand(4, IN)}, "has .*hada_w1_a but no hada_w2_a and hada_w2_b"),
        ({"lokr_w1": rand(4, 8)}, "has .*lokr_w1 but no lokr_w2"),
        ({"lokr_w1": rand(4, 8), "lokr_w2": rand(3, 3)}, "changes a parameter of 12 x 24; the model's is 80 x 32"),
        (lokr_whole()[0] | loha()[0], "has tensors of LoHa and LoKr"),
        ({"dora_scale": rand(OUT, 1)}, "has .*dora_scale but no change that it belongs to"),
        (dora()[0] | {"dora_scale": rand(1, IN)}, r"\[1, 32\]; supported is one length for each of the weight's 80"),
        ({"oft_blocks": rand(2, 3, 4, 4)}, r"is \[2, 3, 4, 4\], which is BOFT"),
        ({"oft_blocks": rand(4, 16, 16)}, "changes a parameter of 64 x 32; the model's is 80 x 32"),
        ({"oft_blocks": rand(5, 16, 8)}, r"is \[5, 16, 8\]; expected square blocks"),
        ({"oft_blocks": rand(5, 16, 16), "rescale": rand(5, 1)}, r"is of 80 rows with a rescale of \[5, 1\]"),
        (loha()[0] | {"hada_w2_b": rand(4, 8)}, "cannot be multiplied element by element"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str):
    with pytest.raises(ValueError, match=message):
        Lora(write(tmp_path / "l.safetensors", tensors), 1.0, TARGETS)


@pytest.mark.parametrize("at_once", [1 << 20, 5 * IN])
def test_what_turns_rows_sees_the_files_own_in_full_precision(
    tmp_path: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
):
    """Rows of others are read for it; a few rows at a time are merged, as of a large weight."""
    monkeypatch.setattr(weights, "MERGED_ELEMENTS", at_once)
    values, tensors = random_weights(), oft()
    save_file(
        {f"{MODULE}.{role}": tensor.contiguous() for role, tensor in tensors[0].items()}, tmp_path / "l.safetensors"
    )
    folder = write_official(tmp_path / "model", values)
    checkpoint = Checkpoint(sorted(folder.glob("*.safetensors")))
    loras = [Lora(tmp_path / "l.safetensors", STRENGTH, checkpoint.shapes)]
    model = weights.empty_model(checkpoint, torch.float32, loras).to_empty(device="cpu")
    weights.read_weights(model, checkpoint, device=torch.device("cpu"), loras=loras)
    assert_close(model.get_parameter(WEIGHT).data, tensors[1](values[WEIGHT]), rtol=1e-5, atol=1e-5)
