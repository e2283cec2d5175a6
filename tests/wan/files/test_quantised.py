"""fp8 weights: kept as they are, unpacked at use, sharded, merged with LoRAs. Formats that cannot be read: named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_formats import (
    Weights,
    comfy_quant,
    is_quantised,
    quantised_layers,
    read_model,
    write_fp8,
    write_scaled,
)
from ranks import run_ranks
from safetensors.torch import save_file
from tiny import random_weights, write_official
from wan_pack.distributed.weights.offload import HostParking
from wan_pack.wan.checkpoint.checkpoint import Checkpoint
from wan_pack.wan.lora.lora import Lora
from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.model.eight_bits import FP8_DTYPES, quantise_rows
from wan_pack.wan.model.rope import rope_table
from wan_pack.wan.transformer.context import Context, pad_text
from wan_pack.wan.transformer.transformer import WanModel, meta_model

CONFIG = WanConfig(dim=128, ffn_dim=80, num_heads=1, num_layers=2, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)
E4M3, E5M2 = FP8_DTYPES
CPU = torch.device("cpu")
Q = "blocks.0.self_attn.q.weight"


def plain_model(values: Weights, compute: torch.dtype) -> WanModel:
    model = meta_model(CONFIG, compute)
    model.load_state_dict({name: values[name].to(p.dtype) for name, p in model.named_parameters()}, assign=True)
    return model


def evaluate(model: WanModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    tokens, rows = torch.randn(45, 64, generator=generator), torch.randn(9, 48, generator=generator)
    return model(tokens, torch.tensor([700.0]), Context(pad_text(rows)), rope_table((3, 3, 5), 128))


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("kind", ["plain", "scale_weight by tensor", "weight_scale by row"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_is_kept_and_computes_as_its_values_do(tmp_path: Path, dtype: torch.dtype, kind: str, compute: torch.dtype):
    values = write_fp8(tmp_path / "m.safetensors", random_weights(CONFIG), kind, dtype)
    model, plain = read_model(tmp_path / "m.safetensors", compute), plain_model(values, compute)
    for name, parameter in model.named_parameters():
        if name in values and is_quantised(name, values[name]):
            layer = model.get_submodule(name.removesuffix(".weight"))
            assert (parameter.dtype, layer.compute_dtype) == (dtype, compute)
            assert torch.equal(layer.unpacked_weight(), values[name].to(compute)), name
    assert torch.equal(evaluate(model), evaluate(plain))


def test_blocks_take_half_the_memory_of_bf16(tmp_path: Path):
    values = write_fp8(tmp_path / "m.safetensors", random_weights(CONFIG), "weight_scale by row", E4M3)
    fp8, bf16 = read_model(tmp_path / "m.safetensors", torch.bfloat16), plain_model(values, torch.bfloat16)
    resident = [HostParking(model.blocks).resident_bytes for model in (fp8, bf16)]
    assert 0.5 < resident[0] / resident[1] < 0.58  # of rows of 80 and 128, scales and biases are a few percent


def test_matrices_of_the_float32_parts_are_unpacked(tmp_path: Path):
    """Files that cast every matrix: the time path and the head stay float32, as under bf16."""
    weights = {n: t.to(E4M3) if t.dim() >= 2 else t for n, t in random_weights(CONFIG).items()}
    save_file(weights, tmp_path / "m.safetensors")
    dtypes = {name: p.dtype for name, p in read_model(tmp_path / "m.safetensors", torch.bfloat16).named_parameters()}
    assert dtypes["time_projection.1.weight"] == dtypes["head.head.weight"] == torch.float32
    assert dtypes["blocks.0.modulation"] == torch.float32
    assert dtypes["patch_embedding.weight"] == torch.bfloat16
    assert dtypes["text_embedding.0.weight"] == E4M3


@pytest.mark.parametrize("per_row", [True, False])
def test_int8_is_unpacked_while_it_is_read(tmp_path: Path, per_row: bool):
    path = tmp_path / "m.safetensors"
    values = write_scaled(path, random_weights(CONFIG), torch.int8, scale="weight_scale", per_row=per_row)
    for compute in (torch.float32, torch.bfloat16):
        model, plain = read_model(path, compute).state_dict(), plain_model(values, compute).state_dict()
        assert model.keys() == plain.keys()
        for name, tensor in model.items():
            assert tensor.dtype == plain[name].dtype and torch.equal(tensor, plain[name]), name
    assert "I8" in Checkpoint([path]).describe() and "unpacked while they are read" in Checkpoint([path]).describe()


@pytest.mark.parametrize("dtype", [*FP8_DTYPES, torch.int8])
def test_rows_of_a_part_have_their_own_scales(tmp_path: Path, dtype: torch.dtype):
    """What every rank but the first reads under FSDP."""
    path = tmp_path / "m.safetensors"
    weights = random_weights(CONFIG)
    # Rows that differ by far more than rounding does.
    weights[Q] = weights[Q] * torch.arange(1, 129)[:, None]
    values = write_scaled(path, weights, dtype, scale="weight_scale", per_row=True)
    checkpoint, staging = Checkpoint([path]), torch.empty(128 * 3, dtype=torch.uint8)
    for first, count in ((0, 128), (1, 1), (40, 60), (127, 1)):
        part = torch.empty(count, 128)
        checkpoint.read_into(Q, part, start=first * 128, staging=staging)
        assert torch.equal(part, values[Q][first : first + count])
        if dtype in FP8_DTYPES:
            codes, scales = torch.empty(count, 128, dtype=dtype), torch.empty(count, 1)
            checkpoint.read_into(Q, codes, start=first * 128, staging=staging)
            checkpoint.read_into(f"{Q}_scale", scales, start=first, staging=staging)
            assert torch.equal(codes.float() * scales, part)


def write_lora(path: Path, targets: list[str], weights: Weights) -> Weights:
    """A LoRA of rank 4 on `targets`. Returns its whole changes."""
    generator, tensors, changes = torch.Generator().manual_seed(9), {}, {}
    for name in targets:
        out, width = weights[name].shape
        up, down = (torch.randn(shape, generator=generator) * 0.1 for shape in ((out, 4), (4, width)))
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}
        changes[name] = up @ down
    save_file(tensors, path)
    return changes


def test_lora_on_other_formats_is_rounded_once(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    values = write_scaled(path, random_weights(CONFIG), torch.int8, scale="weight_scale", per_row=True)
    changes = write_lora(tmp_path / "l.safetensors", [Q], values)
    lora = Lora(tmp_path / "l.safetensors", 1.0, {name: tuple(t.shape) for name, t in values.items()})
    merged = read_model(path, torch.bfloat16, (lora,)).get_parameter(Q)
    torch.testing.assert_close(merged.float(), values[Q] + changes[Q], rtol=2**-8, atol=1e-7)


def test_quantise_rows_keeps_every_row_in_range():
    values = torch.stack([torch.zeros(8), torch.full((8,), 1e-30), torch.full((8,), 3e5), torch.linspace(-1, 1, 8)])
    for dtype in FP8_DTYPES:
        codes, scale = quantise_rows(values, dtype)
        assert codes.float().isfinite().all() and (scale > 0).all()
        torch.testing.assert_close(codes.float() * scale, values, rtol=0.13, atol=0)


@pytest.mark.parametrize(
    ("dtype", "per_row", "share"), [(E4M3, False, 0.54), (E5M2, True, 0.55), (torch.int8, True, 1)]
)
def test_quantised_files_under_fsdp_offload_and_lora(tmp_path: Path, dtype: torch.dtype, per_row: bool, share: float):
    """Two ranks: the same velocity as the values in bf16, of fp8 half of the bytes, and shards of one merged weight."""
    config = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)
    for name in ("fp8", "bf16"):
        (tmp_path / name).mkdir()
    weights = random_weights(config)
    file = tmp_path / "fp8" / "m.safetensors"
    values = write_scaled(file, weights, dtype, scale="weight_scale", per_row=per_row)
    rounded = {name: value.bfloat16() if is_quantised(name, value) else value for name, value in values.items()}
    write_official(tmp_path / "bf16", rounded, config)
    write_lora(tmp_path / "l.safetensors", [Q, "blocks.1.ffn.0.weight"], values)
    arguments = {"fp8": str(tmp_path / "fp8"), "bf16": str(tmp_path / "bf16"), "lora": str(tmp_path / "l.safetensors")}
    for result in run_ranks("fp8_under_fsdp", 2, **arguments):
        assert result["fp8"] <= share * result["bf16"]


def test_a_scale_that_is_not_a_number_is_an_error(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    weights = random_weights(CONFIG)
    weights[Q] = torch.full_like(weights[Q], torch.nan)
    write_scaled(path, weights, E4M3, scale="scale_weight", per_row=False)
    with pytest.raises(ValueError, match=r"m\.safetensors is damaged: a weight's scale"):
        read_model(path, torch.float32)


DESCRIBED = {
    "per_row": (torch.int8, True, {"per_row": True}),
    "no convrot": (torch.int8, True, {"convrot": False, "convrot_groupsize": 256, "per_row": True}),
    "int8 dtype": (torch.int8, False, {"orig_dtype": "torch.bfloat16", "group_size": -1}),
    "fp8 dtype": (E4M3, False, {"orig_dtype": "torch.bfloat16", "orig_shape": [128, 128], "params": {}}),
    "rowwise": (E4M3, True, {"orig_dtype": "torch.bfloat16", "quantized_by": "x", "scale_dtype": "float32"}),
}


@pytest.mark.parametrize("case", DESCRIBED)
def test_options_that_only_describe_change_nothing(tmp_path: Path, case: str):
    dtype, per_row, more = DESCRIBED[case]
    weights, path = random_weights(CONFIG), tmp_path / "m.safetensors"
    form = "int8_tensorwise" if dtype == torch.int8 else "float8_e4m3fn_rowwise" if per_row else "float8_e4m3fn"
    says = {f"{layer}.comfy_quant": comfy_quant(format=form, **more) for layer in quantised_layers(weights)}
    values = write_scaled(path, weights, dtype, scale="weight_scale", per_row=per_row, extra=says)
    model = read_model(path, torch.float32)
    for name, parameter in model.named_parameters():
        if name in values:
            layer = model.get_submodule(name.rpartition(".")[0])
            got = layer.unpacked_weight() if parameter.dtype == E4M3 else parameter
            assert torch.equal(got, values[name]), name


@pytest.mark.parametrize(
    "option",
    [{"group_size": 64}, {"block_size": 128}, {"params": [4]}, {"bits": 4}, {"hadamard": True}],
    ids=lambda option: next(iter(option)),
)
def test_options_that_change_the_values_are_refused_by_name(tmp_path: Path, option: dict[str, object]):
    weights, path = random_weights(CONFIG), tmp_path / "m.safetensors"
    says = {f"{Q.removesuffix('.weight')}.comfy_quant": comfy_quant(format="int8_tensorwise", per_row=True, **option)}
    write_scaled(path, weights, torch.int8, scale="weight_scale", per_row=True, extra=says)
    with pytest.raises(ValueError, match=f"quantised as int8_tensorwise {next(iter(option))}"):
        Checkpoint([path])


ODD_SCALES = {
    "uneven blocks": ({"weight_scale": torch.ones(128, 7)}, r"q\.weight has shape \(128, 7\); expected one number"),
    "three axes": ({"weight_scale": torch.ones(2, 8, 8)}, r"q\.weight has shape \(2, 8, 8\); expected one number"),
    "of uint8": ({"weight_scale": torch.ones(128, 3, dtype=torch.uint8)}, r"has shape \(128, 3\); expected one number"),
    "two levels": ({"weight_scale": torch.ones(()), "weight_scale_2": torch.ones(())}, "expected one number"),
    "second level alone": ({"weight_scale_2": torch.ones(())}, "a scale for tensor .*, but no such weight"),
    "of whole numbers": (
        {"weight_scale": torch.ones(128, dtype=torch.int8)},
        r"the scale of tensor .*q\.weight is of torch\.int8; expected a float dtype",
    ),
    "two levels, one of codes": (
        {
            "weight": torch.zeros(128, 64, dtype=torch.uint8),
            "weight_scale": torch.ones(128, 8).to(E4M3),
            "weight_scale_2": torch.zeros(2, dtype=torch.uint8),
        },
        "expected one number, one for each of its 128 rows",
    ),
    "two levels, those of other codes": (
        {
            "weight": torch.zeros(128, 64, dtype=torch.uint8),
            "weight_scale": torch.ones(128, 8, dtype=torch.uint8),
            "weight_scale_2": torch.ones(()),
        },
        "expected one number, one for each of its 128 rows",
    ),
    "of one number": ({"weight": torch.zeros((), dtype=E4M3), "weight_scale": torch.ones(())}, "but no such weight"),
    "twice": ({"weight_scale": torch.ones(()), "scale_weight": torch.ones(())}, "has two scales"),
    "nunchaku": ({"wscales": torch.ones(2, 128)}, r"quantised as Nunchaku"),
    "nf4": ({"weight.absmax": torch.ones(8)}, r"quantised as bitsandbytes \(4 bit\)"),
    "convrot": (
        {"comfy_quant": comfy_quant(format="int8_tensorwise", convrot=True, convrot_groupsize=100)},
        "convrot_groupsize of .* is 100; it must be a power of 4",
    ),
    "convrot in words": (
        {"comfy_quant": comfy_quant(format="int8_tensorwise", convrot="false", convrot_groupsize=16)},
        "convrot of .* is 'false'; it must be false or true",
    ),
    "int4 that is not turned": (
        {"comfy_quant": comfy_quant(format="convrot_w4a4", convrot=False)},
        "convrot of .* is False; it must be true",
    ),
    "wide convrot": (
        {"comfy_quant": comfy_quant(format="int8_tensorwise", convrot=True), "weight_scale": torch.ones(())},
        r"\(128, 128\) is said to be rotated by groups of 256 inputs",
    ),
    "awq": ({"comfy_quant": comfy_quant(format="awq_w4a16")}, "quantised as awq_w4a16"),
    "broken": ({"comfy_quant": torch.zeros(9, dtype=torch.uint8)}, "describes its quantisation in an unknown way"),
}


@pytest.mark.parametrize("case", ODD_SCALES)
def test_formats_that_cannot_be_read_are_named(tmp_path: Path, case: str):
    extra, words = ODD_SCALES[case]
    path = tmp_path / "m.safetensors"
    weights = random_weights(CONFIG)
    weights[Q] = weights[Q].to(E4M3)
    save_file(weights | {f"{Q.removesuffix('.weight')}.{name}": tensor for name, tensor in extra.items()}, path)
    with pytest.raises(ValueError, match=words) as caught:
        Checkpoint([path])
    assert str(path) in str(caught.value)


def test_packed_weights_are_named(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    for tensor, words in (
        (torch.zeros(128, 64, dtype=torch.uint8), "a packed format"),
        (torch.zeros(128, 128, dtype=torch.int8), "int8 without a scale"),
        (torch.zeros(128, 128, dtype=torch.int64), "I64"),
        (torch.zeros(128, 128).to(torch.float8_e4m3fnuz), "F8_E4M3FNUZ"),
    ):
        save_file(random_weights(CONFIG) | {Q: tensor}, path)
        with pytest.raises(ValueError, match=words):
            Checkpoint([path])
    layers = {layer: {"format": "svdquant_w4a4"} for layer in quantised_layers(random_weights(CONFIG))}
    says = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save_file(random_weights(CONFIG), path, metadata=says)
    with pytest.raises(ValueError, match="quantised as svdquant_w4a4"):
        Checkpoint([path])
