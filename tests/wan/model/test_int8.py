"""Weights that are int8 in memory: the file's codes, or rounded by rows; rotated, sharded, merged, multiplied."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoint_formats import Weights, comfy_quant, is_quantised, read_model, write_scaled
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny import random_weights
from torch import Tensor
from torch._dynamo.utils import counters
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.weights.offload import HostParking
from wan_pack.wan.checkpoint.checkpoint import Checkpoint
from wan_pack.wan.checkpoint.keeping import Keeping
from wan_pack.wan.lora.lora import Lora
from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.model.eight_bits import KeptWeight, quantise_rows
from wan_pack.wan.model.int8_products import int8_products_there, use_int8_products
from wan_pack.wan.model.linear import FP8_PRODUCTS, Linear
from wan_pack.wan.model.precisions import check_precision
from wan_pack.wan.model.rope import rope_table
from wan_pack.wan.transformer.context import Context, pad_text
from wan_pack.wan.transformer.transformer import WanModel, meta_model

CONFIG = WanConfig(dim=256, ffn_dim=192, num_heads=2, num_layers=2, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)
INT8 = Keeping("int8")
Q = "blocks.0.self_attn.q.weight"
GROUP = 16


def rotation(width: int) -> Tensor:
    """[width, width] of ConvRot's groups, by its definition: H(4n)[i, j] = H(n)[i / 4, j / 4] * H(4)[i % 4, j % 4]."""
    small = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    group = torch.tensor([[small[i // 4, j // 4] * small[i % 4, j % 4] for j in range(GROUP)] for i in range(GROUP)])
    return torch.block_diag(*[group / GROUP**0.5] * (width // GROUP))


def write(path: Path, kind: str) -> Weights:
    """int8 "by tensor", "by row", or "rotated" by rows. Returns the values in the basis of the file's codes."""
    weights, says = random_weights(CONFIG), {}
    if kind == "rotated":
        for name, tensor in weights.items():
            if is_quantised(name, tensor):
                weights[name] = tensor @ rotation(tensor.shape[1])
                says[f"{name.removesuffix('.weight')}.comfy_quant"] = comfy_quant(
                    format="int8_tensorwise", convrot=True, convrot_groupsize=GROUP
                )
    return write_scaled(path, weights, torch.int8, scale="weight_scale", per_row=kind != "by tensor", extra=says)


def velocity(model: WanModel) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    tokens, rows = torch.randn(45, 64, generator=generator), torch.randn(9, 48, generator=generator)
    return model(tokens, torch.tensor([700.0]), Context(pad_text(rows)), rope_table((3, 3, 5), 128))


def layers_of(model: WanModel) -> dict[str, Linear]:
    return {
        f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, Linear) and layer.kept
    }


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["by tensor", "by row", "rotated"])
def test_the_files_codes_stay_and_compute_as_their_values_do(tmp_path: Path, kind: str, compute: torch.dtype):
    path = tmp_path / "m.safetensors"
    values = write(path, kind)
    model, stored = read_model(path, compute, keeping=INT8), load_file(path)
    layers = layers_of(model)
    assert layers.keys() == {name for name, value in values.items() if is_quantised(name, value)}
    x = torch.randn(7, CONFIG.dim, generator=torch.Generator().manual_seed(1)).to(compute)
    for name, layer in layers.items():
        assert layer.weight.dtype == torch.float8_e4m3fn and torch.equal(layer.codes, stored[name]), name
        assert torch.equal(layer.unpacked_weight(), values[name].to(compute)), name
        if layer.in_features == CONFIG.dim:
            turned = (x.float() @ rotation(CONFIG.dim)).to(compute) if kind == "rotated" else x
            assert torch.equal(layer(x), F.linear(turned, values[name].to(compute), layer.bias)), name
    if kind == "rotated":
        values = {n: v @ rotation(v.shape[1]) if is_quantised(n, v) else v for n, v in values.items()}
    plain = meta_model(CONFIG, compute)
    plain.load_state_dict({name: values[name].to(p.dtype) for name, p in plain.named_parameters()}, assign=True)
    out, expected = velocity(model), velocity(plain)
    if kind != "rotated":
        assert torch.equal(out, expected)
    error = (out - expected).norm() / expected.norm()
    assert error < (1e-5 if compute == torch.float32 else 1e-2)


def test_other_files_are_rounded_by_rows(tmp_path: Path):
    """The large layers of each block, to the nearest of 127 steps of the row's largest; the rest stays as it is."""
    path, weights = tmp_path / "m.safetensors", {n: t.bfloat16() for n, t in random_weights(CONFIG).items()}
    save_file(weights, path)
    layers = layers_of(read_model(path, torch.bfloat16, keeping=INT8))
    assert layers.keys() == {f"blocks.{i}.{name}.weight" for i in range(2) for name in FP8_PRODUCTS}
    for name, layer in layers.items():
        value = weights[name].float()
        scale = value.abs().amax(dim=1, keepdim=True) / 127
        assert torch.equal(layer.weight_scale, scale)
        assert torch.equal(layer.codes, (value / scale).round().to(torch.int8)), name


def test_fp8_files_stay_fp8(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    write_scaled(path, random_weights(CONFIG), torch.float8_e5m2, scale="weight_scale", per_row=True)
    kept = {layer.kept for layer in layers_of(read_model(path, torch.bfloat16, keeping=INT8)).values()}
    assert kept == {KeptWeight(torch.float8_e5m2, scaled=True)}


def test_blocks_take_half_the_memory_of_bf16_and_the_log_says_so(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    write(path, "by row")
    kept = [
        HostParking(read_model(path, torch.bfloat16, keeping=how).blocks).resident_bytes for how in (INT8, Keeping())
    ]
    assert 0.5 < kept[0] / kept[1] < 0.55
    checkpoint = Checkpoint([path])
    assert checkpoint.describe(INT8.weights(checkpoint)).endswith("20 of them stay int8 in memory, 20 with scales")
    assert checkpoint.describe(Keeping().weights(checkpoint)).endswith(
        "quantised ones are unpacked while they are read"
    )


@pytest.mark.parametrize("kind", ["by tensor", "by row", "rotated"])
def test_lora_merged_into_int8_keeps_the_files_scales_where_they_fit(tmp_path: Path, kind: str):
    path = tmp_path / "m.safetensors"
    values = write(path, kind)
    stored = load_file(path)
    generator = torch.Generator().manual_seed(9)
    up = torch.randint(-1, 2, (256, 4), generator=generator) * 2.0**-4
    down = torch.randint(-1, 2, (4, 256), generator=generator) * 2.0**-4
    up[0], up[1] = 2.0**10, 0
    down[:, 1::2] = 0
    module = Q.removesuffix(".weight")
    save_file({f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}, tmp_path / "l.safetensors")
    lora = Lora(tmp_path / "l.safetensors", 0.5, {name: tuple(t.shape) for name, t in values.items()})
    layer = layers_of(read_model(path, torch.float32, (lora,), INT8))[Q]
    change = up @ down
    exact = values[Q] + 0.5 * (change @ rotation(256) if kind == "rotated" else change)
    own = stored[Q.removesuffix("weight") + "weight_scale"].reshape(-1, 1).expand(256, 1)
    fits = (exact.amax(1, True) < 127.5 * own) & (exact.amin(1, True) > -128.5 * own)
    assert not fits[0] and fits[1] and fits.float().mean() > 0.2
    assert torch.equal(layer.weight_scale[fits], own[fits])
    torch.testing.assert_close(layer.weight_scale, torch.where(fits, own, exact.abs().amax(1, True) / 127))
    codes = (exact / layer.weight_scale).round().to(torch.int8)
    # A rotation there and back leaves a rounding error of float32, which may decide between two codes.
    assert (layer.codes != codes).float().mean() <= (0.001 if kind == "rotated" else 0)
    assert (layer.codes.int() - codes.int()).abs().max() <= 1
    untouched = torch.zeros_like(change, dtype=torch.bool)
    untouched[1] = True
    if kind != "rotated":
        untouched[:, 1::2] = True
    untouched &= fits
    assert torch.equal(layer.codes[untouched], stored[Q][untouched])


@pytest.mark.parametrize("kind", ["by row", "rotated", "bf16"])
def test_int8_under_fsdp_streaming_and_loras(tmp_path: Path, kind: str):
    """Two ranks: integers are no parameters that FSDP shards, so that codes go by another name."""
    folder = tmp_path / "model"
    folder.mkdir()
    if kind == "bf16":
        save_file({n: t.bfloat16() for n, t in random_weights(CONFIG).items()}, folder / "m.safetensors")
    else:
        write(folder / "m.safetensors", kind)
    generator, lora = torch.Generator().manual_seed(2), {}
    for i, (layer, out, width) in product(range(2), (("self_attn.q", 256, 256), ("ffn.2", 256, 192))):
        lora[f"blocks.{i}.{layer}.lora_up.weight"] = torch.randn(out, 4, generator=generator)
        lora[f"blocks.{i}.{layer}.lora_down.weight"] = torch.randn(4, width, generator=generator)
    save_file(lora, tmp_path / "l.safetensors")
    whole = HostParking(read_model(folder / "m.safetensors", torch.bfloat16).blocks).resident_bytes
    settings = {"mixed_precision": "bf16", "linear_precision": "int8"}
    loras = [(str(tmp_path / "l.safetensors"), 0.1)]
    for result in run_ranks("codes_spread", 2, folder=str(folder), loras=loras, settings=settings):
        assert result["bytes"] <= (0.65 if kind == "bf16" else 0.6) * whole / 2
        # A file without codes gets its LoRA before it is rounded, and is read for another one.
        assert bool(result["read"]) == (kind == "bf16")


def test_products_of_codes_where_the_package_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each layer of int8 codes is given to comfy-kitchen as it names things; the layers of other weights are not."""
    path, calls = tmp_path / "m.safetensors", []

    def int8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, **more: Any) -> Tensor:
        assert weight.dtype == torch.int8 and weight_scale.shape == (len(weight), 1)
        calls.append(more["convrot_groupsize"] if more.get("convrot") else 0)
        turned = x.float() @ rotation(x.shape[1]) if more.get("convrot") else x.float()
        return (F.linear(turned, weight.float() * weight_scale) + more["bias"]).to(more["out_dtype"])

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "comfy_kitchen", ModuleType("comfy_kitchen"))
    sys.modules["comfy_kitchen"].__dict__["int8_linear"] = int8_linear
    for kind, group in (("by tensor", 0), ("rotated", GROUP)):
        write(path, kind)
        model = read_model(path, torch.float32, keeping=INT8)
        plain = velocity(model)
        assert use_int8_products(model) == 20
        torch.testing.assert_close(velocity(model), plain, rtol=1e-4, atol=1e-4)
        assert calls == [group] * 20
        calls.clear()
    assert use_int8_products(read_model(path, torch.float32)) == 0


@pytest.mark.skipif(not int8_products_there(), reason="comfy-kitchen is not installed")
def test_a_compiled_graph_holds_comfy_kitchens_product_whole(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    write(path, "rotated")
    layer = layers_of(read_model(path, torch.bfloat16, keeping=INT8))[Q]
    use_int8_products(torch.nn.Sequential(layer))
    x = torch.randn(9, CONFIG.dim, generator=torch.Generator().manual_seed(1)).bfloat16()
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer.forward, backend="aot_eager", fullgraph=True)(x), layer(x))


def test_without_the_package_weights_are_unpacked(monkeypatch: pytest.MonkeyPatch):
    for missing in ("comfy_kitchen", "packaging"):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, missing=missing: None if name == missing else name
        )
        assert not int8_products_there() and use_int8_products(torch.nn.Linear(2, 2)) == 0


@pytest.mark.skipif(not int8_products_there(), reason="comfy-kitchen is not installed")
@pytest.mark.parametrize("kind", ["by tensor", "by row", "rotated"])
def test_comfy_kitchen_gives_the_same_but_for_rounded_activations(tmp_path: Path, kind: str):
    path = tmp_path / "m.safetensors"
    write(path, kind)
    model = read_model(path, torch.bfloat16, keeping=INT8)
    plain = velocity(model)
    assert use_int8_products(model) == 20
    error = (velocity(model) - plain).norm() / plain.norm()
    assert 0 < error < 3e-2


def test_compiled_segments_hold_the_products_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Reading bytes as int8, turning and unpacking are traced without a break, and give the same."""
    from wan_pack.distributed.parallel.parallelize import parallelize_wan
    from wan_pack.distributed.parallel.sequence import SequenceShard
    from wan_pack.wan.model.attention import attention

    path = tmp_path / "m.safetensors"
    write(path, "rotated")
    plain = velocity(read_model(path, torch.bfloat16, keeping=INT8))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    model = read_model(path, torch.bfloat16, keeping=INT8)
    parallelize_wan(
        model, None, shard=SequenceShard(length=45), attention=attention, use_fsdp=False, ulysses_engine="packed",
        torch_compile=True, memory_optimization=False,
    )  # fmt: skip
    assert torch.equal(velocity(model), plain)
    assert sum(counters["graph_break"].values()) == 0 and counters["stats"]["unique_graphs"] >= 3


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_row_of_zeros_whose_scale_is_0_stays_zeros(dtype: torch.dtype):
    codes, scale = quantise_rows(torch.zeros(1, 4), dtype, torch.zeros(1, 1))
    assert codes.float().eq(0).all() and scale.item() == 1


def test_int8_runs_on_any_gpu_and_in_any_precision():
    for capability in (None, (7, 5), (8, 0), (9, 0)):
        check_precision(capability, "int8")
    for precision in ("bf16", "fp16", "fp32"):
        assert Parallel(gpu_count=1, linear_precision="int8", mixed_precision=precision).linear_precision == "int8"


def test_what_is_kept_needs_no_gpu(tmp_path: Path):
    """The planner asks with headers alone."""
    path = tmp_path / "m.safetensors"
    write(path, "rotated")
    checkpoint = Checkpoint([path])
    assert INT8.weights(checkpoint)[Q] == KeptWeight(torch.int8, scaled=True, rotated_by=GROUP)
    assert Keeping().weights(checkpoint) == {}
    assert Keeping("fp8").weights(checkpoint)[Q] == KeptWeight(torch.float8_e4m3fn, scaled=True)
