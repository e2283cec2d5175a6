"""Large matrix products of fp8 codes: their arithmetic, where the codes come from, sharding and LoRAs."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from checkpoint_formats import Weights, write_plain_fp8, write_scaled
from ranks import run_ranks
from safetensors.torch import save_file
from tiny import random_weights, write_official
from torch._dynamo.utils import counters
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.rank.expert import load_expert, relora_expert
from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.model.eight_bits import E4M3, FP8_DTYPES, KeptWeight, quantise_rows
from wan_pack.wan.model.linear import FP8_PRODUCTS, Fp8Tokens, Linear, cast_tokens
from wan_pack.wan.model.precisions import check_precision
from wan_pack.wan.model.rope import rope_table
from wan_pack.wan.transformer.context import Context, pad_text
from wan_pack.wan.transformer.transformer import WanModel

CONFIG = WanConfig(dim=128, ffn_dim=96, num_heads=1, num_layers=2, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)
CPU = torch.device("cpu")
BF16 = torch.bfloat16
FP8 = Parallel(gpu_count=1, linear_precision="fp8", quantised_loras="merged")
NAMES = [f"blocks.{i}.{layer}.weight" for i in range(CONFIG.num_layers) for layer in FP8_PRODUCTS]


def load(file: Path, parallel: Parallel = FP8, loras: tuple[tuple[str, float], ...] = ()) -> WanModel:
    return load_expert([str(file)], loras, parallel=parallel, mesh=None, shard=SequenceShard(length=45), device=CPU)


def evaluate(model: WanModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    tokens, rows = torch.randn(45, 64, generator=generator), torch.randn(9, 48, generator=generator)
    rope = rope_table((3, 3, 5), CONFIG.head_dim)
    return model(tokens, torch.tensor([700.0]), Context(pad_text(rows)), rope)


@pytest.fixture
def weights() -> Weights:
    return random_weights(CONFIG)


@pytest.fixture
def file(tmp_path: Path, weights: Weights) -> Path:
    folder = write_official(tmp_path / "model", weights, CONFIG)
    return folder / "diffusion_pytorch_model.safetensors"


def codes_of(model: WanModel, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    layer = model.get_submodule(name.removesuffix(".weight"))
    return layer.weight, layer.weight_scale


def fp8_layer(bias: bool = True) -> tuple[Linear, torch.Tensor]:
    """A layer of fp8 products, and input of which one row is large and one is zero."""
    generator = torch.Generator().manual_seed(0)
    layer = Linear(32, 48)
    values = torch.randn(48, 32, generator=generator)
    layer.bias = torch.nn.Parameter(torch.randn(48, generator=generator).to(BF16)) if bias else None
    layer.keep(KeptWeight(E4M3, scaled=True), BF16)
    codes, scale = quantise_rows(values, E4M3)
    layer.weight.data.copy_(codes)
    layer.weight_scale.data.copy_(scale)
    layer.fp8_product = True
    x = torch.randn(5, 32, generator=generator)
    x[1] *= 1000
    x[2] = 0
    return layer, x


@pytest.mark.parametrize("bias", [True, False])
def test_product_is_that_of_the_codes_rounded_once(bias: bool):
    layer, x = fp8_layer(bias)
    codes, scale = quantise_rows(x, E4M3)
    weight = layer.weight.double() * layer.weight_scale
    exact = F.linear(codes.double() * scale, weight, layer.bias.double() if bias else None)
    out = layer(x)
    assert out.dtype == BF16
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-4)
    # Cast beforehand, as a fused kernel does, it is the same in every bit.
    assert torch.equal(layer(cast_tokens(x, E4M3)), out)


def test_each_row_keeps_its_precision():
    """A large row leaves the others as they are, and a row of zeros is the bias."""
    layer, x = fp8_layer()
    exact = F.linear(x, layer.weight.float() * layer.weight_scale, layer.bias.float())
    out = layer(x).float()
    for row in (0, 1, 3, 4):
        assert ((out[row] - exact[row]).norm() / exact[row].norm()).item() < 0.05
    assert torch.equal(out[2], layer.bias.float())


@pytest.mark.parametrize("public", [True, False], ids=["scaled_mm", "_scaled_mm"])
def test_gpu_product_gets_what_the_documentation_asks_for(public: bool, monkeypatch: pytest.MonkeyPatch):
    """e4m3 codes, the first row-major, the second column-major; scales [M, 1] and [1, N] of float32; a bf16 bias.

    By torch's public function where it has one, and before torch 2.10 by the other.
    """
    from wan_pack.wan.model import linear

    def product(a, b, scale_a, scale_b, *, bias, out_dtype, use_fast_accum):  # type: ignore[no-untyped-def]
        assert a.dtype == b.dtype == E4M3
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        assert scale_a.shape == (5, 1)
        assert scale_b.shape == (1, 48)
        assert scale_a.dtype == scale_b.dtype == torch.float32
        assert scale_a.is_contiguous() and scale_b.is_contiguous()
        assert bias.dtype == out_dtype == BF16
        assert use_fast_accum
        return (a.float() @ b.float() * scale_a * scale_b + bias.float()).to(out_dtype)

    def scaled_mm(a, b, scale_a, recipe_a, scale_b, recipe_b, *, output_dtype, **more):  # type: ignore[no-untyped-def]
        assert (recipe_a, recipe_b) == ("by rows", "by rows")
        return product(a, b, scale_a, scale_b, out_dtype=output_dtype, **more)

    if public:
        monkeypatch.setattr(F, "ScalingType", SimpleNamespace(RowWise="by rows"), raising=False)
        monkeypatch.setattr(F, "scaled_mm", scaled_mm, raising=False)
        monkeypatch.delattr(torch, "_scaled_mm", raising=False)
    else:
        monkeypatch.delattr(F, "scaled_mm", raising=False)
        monkeypatch.setattr(torch, "_scaled_mm", product)
    layer, x = fp8_layer()
    rows = cast_tokens(x, E4M3)
    assert isinstance(rows, Fp8Tokens)
    out = linear._multiply(rows, layer.weight, layer.weight_scale, layer.bias, BF16)
    torch.testing.assert_close(out, layer(x))
    unscaled = linear._multiply(rows, layer.weight, None, layer.bias, BF16)
    layer.weight_scale = None
    torch.testing.assert_close(unscaled, layer(x))


def test_old_gpus_are_refused_by_name():
    for capability in (None, (8, 9), (9, 0), (12, 0)):
        check_precision(capability, "fp8")
    check_precision((8, 0), "full")
    with pytest.raises(ValueError, match=r"linear_precision is 'fp8'.*8\.9 or newer; this one has 8\.0"):
        check_precision((8, 0), "fp8")


def test_weights_are_quantised_by_rows_from_the_files_values(file: Path, weights: Weights):
    model = load(file)
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype in FP8_DTYPES}
    assert kept == set(NAMES)
    for name in NAMES:
        codes, scale = quantise_rows(weights[name], E4M3)
        assert torch.equal(codes_of(model, name)[0].float(), codes.float()), name
        assert torch.equal(codes_of(model, name)[1], scale), name
    plain = evaluate(load(file, Parallel(gpu_count=1, mixed_precision="fp32")))
    error = ((evaluate(model) - plain).norm() / plain.norm()).item()
    assert 1e-3 < error < 0.1, f"8 bits show ({error}), and no more than they should"


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("kind", ["plain", "scaled"])
def test_a_files_own_e4m3_codes_are_used(kind: str, dtype: torch.dtype, tmp_path: Path, weights: Weights):
    """e5m2 ones, which GPUs do not take in such products, are coded again."""
    path = tmp_path / "fp8.safetensors"
    if kind == "plain":
        values = write_plain_fp8(path, weights, dtype)
    else:
        values = write_scaled(path, weights, dtype, scale="scale_weight", per_row=False)
    own = load(path, Parallel(gpu_count=1))
    model = load(path)
    for name in NAMES:
        codes, scale = codes_of(model, name)
        if dtype == E4M3:
            assert torch.equal(codes.float(), codes_of(own, name)[0].float()), name
            assert (scale is None) == (kind == "plain")
        else:
            expected = quantise_rows(values[name].float(), E4M3)
            assert torch.equal(codes.float(), expected[0].float()), name
            assert torch.equal(scale, expected[1]), name
    exact = evaluate(own)
    assert ((evaluate(model) - exact).norm() / exact.norm()).item() < 0.1


def lora_file(path: Path, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in (f"blocks.{seed % 2}.self_attn.q", "blocks.0.ffn.2"):
        rows, columns = (128, 96) if "ffn" in layer else (128, 128)
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    save_file(tensors, path)
    return str(path)


def test_loras_are_merged_before_the_weight_is_quantised(file: Path, weights: Weights, tmp_path: Path):
    """And exchanged in a warm model as a fresh start would have it."""
    first, second = (lora_file(tmp_path / f"{seed}.safetensors", seed) for seed in (0, 1))
    model = load(file, loras=((first, 0.5),))
    merged = load(file, Parallel(gpu_count=1, mixed_precision="fp32"), ((first, 0.5),))
    for name in NAMES:
        codes, scale = quantise_rows(codes_of(merged, name)[0], E4M3)
        assert torch.equal(codes_of(model, name)[0].float(), codes.float()), name
        assert torch.equal(codes_of(model, name)[1], scale), name
    for before, after in (((first,), ((second, 1.0),)), ((second,), ())):
        assert relora_expert(model, [str(file)], before, after, parallel=FP8, device=CPU)
        fresh = dict(load(file, loras=after).named_parameters())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.float(), fresh[name].float()), name


def test_chunked_feed_forward_is_exact(file: Path):
    model = load(file)
    plain = evaluate(model)
    for block in model.blocks:
        block.ffn_chunk = random.Random(0).randint(5, 9)
    torch.testing.assert_close(evaluate(model), plain, rtol=2e-2, atol=2e-2 * plain.abs().max().item())


def test_compiled_segments_hold_the_products_whole(file: Path, monkeypatch: pytest.MonkeyPatch):
    """Casting to codes and the product are traced without a break, and give the same."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    compiled = load(file, Parallel(gpu_count=1, linear_precision="fp8", torch_compile=True))
    assert torch.equal(evaluate(compiled), evaluate(load(file)))
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_fp8_products_under_fsdp_and_ulysses(file: Path):
    """On two ranks the velocity is that of one, and together they keep one copy, in 8 bits."""
    results = run_ranks("fp8_products_sharded", 2, folder=str(file.parent))
    whole = sum(parameter.nbytes for parameter in load(file).parameters())
    # A parameter of one row is padded to one for each rank.
    assert whole <= sum(result["bytes"] for result in results) < 1.02 * whole


@pytest.mark.parametrize(
    ("kept", "plain"),
    [
        (None, True), (KeptWeight(torch.float8_e4m3fn, scaled=True), True), (KeptWeight(torch.int8, True), True),
        (KeptWeight(torch.int8, True, rotated_by=16), False),
        (KeptWeight(torch.float8_e4m3fn, True, lora_rank=2), False), ("fp8 product", False), ("int8 product", False),
    ],
)  # fmt: skip
def test_a_layer_is_plain_if_its_unpacked_weight_is_all_that_it_multiplies_by(kept: object, plain: bool):
    """Then its product and an activation may be one."""
    layer = Linear(16, 8)
    if isinstance(kept, KeptWeight):
        layer.keep(kept, torch.float32)
    layer.fp8_product = kept == "fp8 product"
    layer.int8_product = (lambda *_: torch.zeros(1)) if kept == "int8 product" else None
    assert layer.is_plain is plain
