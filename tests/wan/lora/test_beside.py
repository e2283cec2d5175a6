"""LoRAs beside weights in 8 bits: never rounded into them, and no weight is read when a strength changes."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from checkpoint_formats import Weights, is_quantised, read_model, write_fp8, write_scaled
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny import random_weights
from torch import Tensor
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.rank.expert import load_expert, relora_expert
from wan_pack.wan.checkpoint.checkpoint import Checkpoint
from wan_pack.wan.checkpoint.keeping import Keeping
from wan_pack.wan.lora.beside import read_factor
from wan_pack.wan.lora.lora import Lora
from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.model.eight_bits import quantise_rows
from wan_pack.wan.model.linear import Linear
from wan_pack.wan.model.rope import rope_table
from wan_pack.wan.transformer.context import Context, pad_text
from wan_pack.wan.transformer.transformer import WanModel, meta_model

CONFIG = WanConfig(dim=128, ffn_dim=80, num_heads=1, num_layers=2, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)
E4M3, CPU = torch.float8_e4m3fn, torch.device("cpu")
BESIDE = Keeping(quantised_loras="beside")
TARGETS = ("blocks.0.self_attn.q", "blocks.0.cross_attn.k", "blocks.1.ffn.0", "blocks.1.ffn.2")
Changes = dict[str, Tensor]


def write_lora(path: Path, seed: int, rank: int = 4, more: Weights | None = None) -> Changes:
    """Of weak changes, far below a step of most weights. Returns them by weight."""
    generator, tensors, changes = torch.Generator().manual_seed(seed), dict(more or {}), {}
    shapes = {name: tuple(tensor.shape) for name, tensor in random_weights(CONFIG).items()}
    for target in TARGETS:
        out, width = shapes[f"{target}.weight"]
        up, down = (torch.randn(shape, generator=generator) * 0.05 for shape in ((out, rank), (rank, width)))
        tensors |= {
            f"{target}.lora_up.weight": up,
            f"{target}.lora_down.weight": down,
            f"{target}.alpha": torch.tensor(2.0),
        }
        changes[f"{target}.weight"] = 2 / rank * up @ down
    save_file(tensors, path)
    return changes


def velocity(model: WanModel) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    tokens, rows = torch.randn(45, 64, generator=generator), torch.randn(9, 48, generator=generator)
    return model(tokens, torch.tensor([700.0]), Context(pad_text(rows)), rope_table((3, 3, 5), 128))


def loras_of(folder: Path, shapes: Weights, **strengths: float) -> list[Lora]:
    sizes = {name: tuple(tensor.shape) for name, tensor in shapes.items()}
    return [Lora(folder / f"{name}.safetensors", strength, sizes) for name, strength in strengths.items()]


@pytest.mark.parametrize("kind", ["plain", "scale_weight by tensor", "weight_scale by row"])
def test_the_velocity_is_that_of_the_unrounded_sum(tmp_path: Path, kind: str):
    """Two LoRAs at once, in float32: exact; merged, their changes are mostly lost in the rounding."""
    path = tmp_path / "m.safetensors"
    values = write_fp8(path, random_weights(CONFIG), kind, E4M3)
    changes = [write_lora(tmp_path / "a.safetensors", 1), write_lora(tmp_path / "b.safetensors", 2, rank=3)]
    loras = loras_of(tmp_path, values, a=0.7, b=-0.4)
    model = read_model(path, torch.float32, loras, BESIDE)
    stored = load_file(path)
    exact = meta_model(CONFIG, torch.float32)
    summed = {
        n: v + sum(s * c[n] for s, c in zip((0.7, -0.4), changes, strict=True) if n in c) for n, v in values.items()
    }
    exact.load_state_dict({name: summed[name] for name, _ in exact.named_parameters()}, assign=True)
    for target in TARGETS:
        layer = model.get_submodule(target)
        assert isinstance(layer, Linear) and layer.kept is not None and layer.kept.lora_rank == 7
        assert torch.equal(layer.weight.view(torch.uint8), stored[f"{target}.weight"].view(torch.uint8)), (
            "as in the file"
        )
    expected = velocity(exact)

    def error(of: WanModel) -> float:
        return float((velocity(of) - expected).norm() / expected.norm())

    assert error(model) < 1e-5
    assert error(read_model(path, torch.float32, loras)) > 100 * error(model)


def test_the_sum_is_of_three_products_in_the_compute_dtype(tmp_path: Path):
    path, target = tmp_path / "m.safetensors", TARGETS[2]
    values = write_scaled(path, random_weights(CONFIG), E4M3, scale="weight_scale", per_row=True)
    write_lora(tmp_path / "a.safetensors", 1)
    layer = read_model(path, torch.bfloat16, loras_of(tmp_path, values, a=0.5), BESIDE).get_submodule(target)
    factors = load_file(tmp_path / "a.safetensors")
    up = (0.5 * 2 / 4 * factors[f"{target}.lora_up.weight"]).bfloat16()
    down = factors[f"{target}.lora_down.weight"].bfloat16()
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    plain = F.linear(x, values[f"{target}.weight"].bfloat16(), layer.bias)
    torch.testing.assert_close(layer(x), plain + F.linear(F.linear(x, down), up), rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize(("precision", "dtype"), [("fp8", E4M3), ("int8", torch.int8)])
def test_beside_products_of_the_files_own_codes(tmp_path: Path, precision: str, dtype: torch.dtype):
    path = tmp_path / "m.safetensors"
    values = write_scaled(path, random_weights(CONFIG), dtype, scale="weight_scale", per_row=True)
    change = write_lora(tmp_path / "a.safetensors", 1)
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    keeping = Keeping(precision, "beside")
    model, without = (
        read_model(path, torch.bfloat16, loras, keeping) for loras in (loras_of(tmp_path, values, a=4.0), ())
    )
    layer, base = (each.get_submodule("blocks.1.ffn.0") for each in (model, without))
    expected = x.float() @ (4 * change["blocks.1.ffn.0.weight"]).T
    difference = layer(x).float() - base(x).float()
    assert (difference - expected).norm() < 3e-2 * expected.norm()


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_what_is_only_rounded_here_is_merged_before(tmp_path: Path, precision: str):
    """That loses nothing, and takes no time per step."""
    path = tmp_path / "m.safetensors"
    values = {name: tensor.bfloat16() for name, tensor in random_weights(CONFIG).items()}
    save_file(values, path)
    change = write_lora(tmp_path / "a.safetensors", 1)
    model = read_model(path, torch.bfloat16, loras_of(tmp_path, values, a=4.0), Keeping(precision, "beside"))
    layer = model.get_submodule("blocks.1.ffn.0")
    assert layer.kept.lora_rank == 0
    exact = values["blocks.1.ffn.0.weight"].float() + 4 * change["blocks.1.ffn.0.weight"]
    codes, scale = quantise_rows(exact, layer.kept.dtype)
    torch.testing.assert_close(layer.unpacked_weight().float(), codes.float() * scale, rtol=2**-8, atol=1e-6)
    other = model.get_parameter("blocks.0.cross_attn.k.weight")
    exact = values["blocks.0.cross_attn.k.weight"].float() + 4 * change["blocks.0.cross_attn.k.weight"]
    torch.testing.assert_close(other.float(), exact, rtol=2**-8, atol=1e-6)


def test_what_is_no_product_of_two_matrices_is_merged(tmp_path: Path):
    """A full difference of one weight, and of a bias, in a file whose other changes stay beside theirs."""
    path = tmp_path / "m.safetensors"
    values = write_scaled(path, random_weights(CONFIG), E4M3, scale="weight_scale", per_row=True)
    diff = torch.randn(128, 128, generator=torch.Generator().manual_seed(5)) * 0.1
    bias = torch.randn(128, generator=torch.Generator().manual_seed(6))
    more = {f"{TARGETS[0]}.diff": diff, f"{TARGETS[0]}.diff_b": bias}
    write_lora(tmp_path / "a.safetensors", 1, more=more)
    layer = read_model(path, torch.float32, loras_of(tmp_path, values, a=1.0), BESIDE).get_submodule(TARGETS[0])
    assert layer.kept.lora_rank == 4
    name, largest = f"{TARGETS[0]}.weight", 448
    exact, own = values[name] + diff, load_file(path)[f"{name}_scale"]
    scale = torch.where(exact.abs().amax(1, True) <= own * 464, own, exact.abs().amax(1, True) / largest)
    assert torch.equal(layer.weight.float(), (exact / scale).clamp(-largest, largest).to(E4M3).float())
    assert torch.equal(layer.bias, values[f"{TARGETS[0]}.bias"] + bias)


def test_another_strength_reads_no_weight_and_a_higher_rank_begins_anew(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    write_scaled(path, random_weights(CONFIG), E4M3, scale="weight_scale", per_row=True)
    for name, rank in (("a", 4), ("b", 4), ("c", 5), ("d", 3)):
        write_lora(tmp_path / f"{name}.safetensors", ord(name), rank=rank)
    a, b, c, d = (str(tmp_path / f"{name}.safetensors") for name in "abcd")
    parallel = Parallel(gpu_count=1, mixed_precision="fp32")
    how = {"parallel": parallel, "device": CPU}
    shard = SequenceShard(length=45)
    model = load_expert([str(path)], [(a, 1.0)], mesh=None, shard=shard, **how)
    for before, after in (((a,), [(a, 0.25)]), ((a,), [(b, 1.0)])):
        with mock.patch.object(Checkpoint, "read_into", side_effect=AssertionError("a weight is read")):
            assert relora_expert(model, [str(path)], before, after, **how)
        fresh = load_expert([str(path)], after, mesh=None, shard=shard, **how)
        assert torch.equal(velocity(model), velocity(fresh))
    # Turned off, on again, and of a lower rank.
    for before, after in (((b,), []), ((), [(a, 1.0)]), ((a,), [(d, 0.5)]), ((d,), [(b, 1.0)])):
        with mock.patch.object(Checkpoint, "read_into", side_effect=AssertionError("a weight is read")):
            told: list[tuple[int, int]] = []
            assert relora_expert(
                model, [str(path)], before, after, on_tensor=lambda *given, told=told: told.append(given), **how
            )
        assert told and told == [(done, len(told)) for done in range(1, len(told) + 1)], "how far it is"
        fresh = load_expert([str(path)], after, mesh=None, shard=shard, **how)
        torch.testing.assert_close(velocity(model), velocity(fresh), rtol=1e-5, atol=1e-6)
    for other in ([(c, 1.0)], [(b, 1.0), (a, 1.0)]):
        assert not relora_expert(model, [str(path)], (b,), other, **how)
    assert torch.equal(velocity(model), velocity(fresh)), "as it was"


def test_beside_on_two_ranks(tmp_path: Path):
    """With FSDP, without, and streamed."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_scaled(folder / "m.safetensors", random_weights(CONFIG), E4M3, scale="weight_scale", per_row=False)
    write_lora(tmp_path / "a.safetensors", 1)
    loras = [(str(tmp_path / "a.safetensors"), 40.0)]
    for result in run_ranks("codes_spread", 2, folder=str(folder), loras=loras, settings={"mixed_precision": "bf16"}):
        assert result["read"] == []


def test_every_quantised_weight_may_have_one(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    values = write_fp8(path, random_weights(CONFIG), "plain", E4M3)
    names = {name for name, value in values.items() if is_quantised(name, value)}
    kept = BESIDE.weights(Checkpoint([path]))
    assert names == {name for name, weight in kept.items() if not weight.lora_rank and not weight.scaled}


def test_any_rows_of_the_factors_are_those_of_the_whole(tmp_path: Path):
    """Of two files, one after the other: what a rank of several keeps of them."""
    shapes = random_weights(CONFIG)
    changes = [write_lora(tmp_path / "a.safetensors", 1), write_lora(tmp_path / "b.safetensors", 2, rank=3)]
    loras, name = loras_of(tmp_path, shapes, a=0.7, b=-0.4), "blocks.1.ffn.0.weight"
    down, up = torch.empty(7, 128), torch.empty(80, 7)
    read_factor(loras, name, "lora_down", down, 0)
    read_factor(loras, name, "lora_up", up, 0)
    torch.testing.assert_close(up @ down, 0.7 * changes[0][name] - 0.4 * changes[1][name])
    for factor, whole in (("lora_down", down), ("lora_up", up)):
        rows = torch.empty(3, whole.shape[1])
        read_factor(loras, name, factor, rows, 2)
        assert torch.equal(rows, whole[2:5])
    # Where there is room for a higher rank, shards may end within the files' rows or behind them.
    for first, count in ((0, 12), (5, 4), (7, 5), (9, 3)):
        rows = torch.full((count, 128), torch.nan)
        read_factor(loras, name, "lora_down", rows, first)
        assert torch.equal(rows, torch.cat((down, torch.zeros(5, 128)))[first : first + count])
    rows = torch.full((3, 12), torch.nan)
    read_factor(loras, name, "lora_up", rows, 2)
    assert torch.equal(rows, torch.cat((up[2:5], torch.zeros(3, 5)), dim=1))
    read_factor([], name, "lora_up", rows, 2)
    assert not rows.any()
