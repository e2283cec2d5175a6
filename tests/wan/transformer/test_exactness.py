"""Steps and blocks that round nothing to 8 bits, in a model that otherwise does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from layers import attention_on_codes
from made_up_video import CPU, velocity_by
from ranks import run_ranks
from tiny import random_weights, write_official
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.job.sampling import EVERYWHERE, NOWHERE, RoundedTimesteps
from wan_pack.distributed.parallel.parallelize import Computing, compute_as
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.rank.expert import VelocityPredictor, load_expert
from wan_pack.wan.checkpoint.keeping import Keeping
from wan_pack.wan.model.attention import attention
from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.model.eight_bits import E4M3, KeptWeight
from wan_pack.wan.model.linear import FP8_PRODUCTS, Linear
from wan_pack.wan.transformer.transformer import WanModel

CONFIG = WanConfig(dim=128, ffn_dim=96, num_heads=4, num_layers=3, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)
FP8 = {"linear_precision": "fp8", "quantised_loras": "merged"}
WHOLE = SequenceShard(length=45)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_official(tmp_path_factory.mktemp("exact") / "model", random_weights(CONFIG), CONFIG)


def load(folder: Path, **settings: Any) -> WanModel:
    files = [str(file) for file in folder.glob("*.safetensors")]
    return load_expert(
        files, parallel=Parallel(gpu_count=1, **settings), mesh=None, shard=WHOLE, device=CPU,
        attention=attention_on_codes if settings else attention, exact_attention=attention,
    )  # fmt: skip


def velocity(model: WanModel, exact: bool | None = None) -> torch.Tensor:
    if exact is not None:
        model.compute_exactly(exact)
    return velocity_by(model, Parallel(gpu_count=1), None, WHOLE, times=1)[0]


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return ((out - exact).norm() / exact.norm()).item()


def unpacked(model: WanModel, plain: WanModel) -> None:
    """Gives `plain` the values that `model` keeps in 8 bits."""
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            plain.get_submodule(name).weight.data = layer.unpacked_weight()


def test_an_exact_step_multiplies_the_weights_as_they_are_kept(folder: Path):
    """It has the bits of a model of these values, and the next step rounds again."""
    plain, model = load(folder), load(folder, **FP8)
    kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rounded = velocity(model)
    unpacked(model, plain)
    exact = velocity(plain)
    assert error(rounded, exact) > 1e-2
    for _ in range(2):
        assert torch.equal(velocity(model, True), exact)
        assert torch.equal(velocity(model, False), rounded)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == kept[name].dtype and torch.equal(parameter.float(), kept[name].float()), name


def test_exact_blocks_keep_the_files_weights_and_round_nothing(folder: Path):
    """The others do; all of them exact are the plain model."""
    plain = load(folder)
    exact = velocity(plain)
    errors = []
    for blocks, numbers in (("", ()), ("1", (1,)), ("0-1", (0, 1)), ("0, 1-2", (0, 1, 2))):
        model = load(folder, exact_blocks=blocks, **FP8)
        for index, block in enumerate(model.blocks):
            for name in FP8_PRODUCTS:
                layer, original = block.get_submodule(name), plain.blocks[index].get_submodule(name)
                assert (layer.weight.dtype == E4M3) is (index not in numbers)
                assert index not in numbers or torch.equal(layer.weight, original.weight)
        errors.append(error(velocity(model), exact))
        # In an exact step all of it is, and afterwards no more than before.
        first = velocity(model)
        velocity(model, True)
        assert torch.equal(velocity(model, False), first)
    assert errors[0] > errors[1] > errors[2] > errors[3] == 0


def test_a_kept_model_takes_another_jobs_exact_blocks(folder: Path):
    """Where no weights are rounded none are read again: only attention is another one."""
    plain = velocity(load(folder))
    model = load(folder, attention="sage")
    for blocks, exact in (("", False), ("0-2", True), ("1", False), ("", False)):
        parallel = Parallel(gpu_count=1, attention="sage", exact_blocks=blocks)
        compute_as(model, None, WHOLE, Computing.of(parallel, attention_on_codes, "plain", attention))
        assert torch.equal(velocity(model), plain) is exact
        assert torch.equal(velocity(model, True), plain) and torch.equal(velocity(model, False), plain) is exact


def test_vace_blocks_go_with_the_block_that_they_follow():
    config = WanConfig(
        dim=128, ffn_dim=96, num_heads=4, num_layers=6, in_dim=16, out_dim=16, text_dim=48, freq_dim=32,
        parts=frozenset({"vace"}), vace_layers=(0, 2, 4),
    )  # fmt: skip
    assert config.with_vace_blocks((0, 1, 4)) == {"blocks.0", "blocks.1", "blocks.4", "vace_blocks.0", "vace_blocks.2"}
    assert config.with_vace_blocks(()) == frozenset()
    products = Keeping("fp8", exact_blocks=(2,)).fp8_products(config)
    rounded = [name for name in config.block_names if name not in ("blocks.2", "vace_blocks.1")]
    assert products == [f"{block}.{layer}" for block in rounded for layer in FP8_PRODUCTS] and len(rounded) == 7


def test_a_step_is_exact_by_its_timestep(folder: Path):
    """Whichever expert runs it."""
    models = {name: load(folder, **FP8) for name in ("high_noise", "low_noise")}
    steps = [("high_noise", 1000.0), ("high_noise", 880.0), ("low_noise", 700.0), ("low_noise", 100.0)]
    for rounded, expected in (
        (RoundedTimesteps(above=200.0, below=900.0), [True, False, False, True]),
        (NOWHERE, [True] * 4),
        (EVERYWHERE, [False] * 4),
    ):
        predictor = VelocityPredictor(
            models, {True: torch.zeros(3, CONFIG.text_dim)}, grid=(3, 3, 5), shard=WHOLE, device=CPU, keep_text=True,
            weights={}, rounded=rounded,
        )  # fmt: skip
        for (expert, timestep), exact in zip(steps, expected, strict=True):
            predictor.predict(expert, torch.zeros(45, 64), timestep, (True,))
            layers = [module for module in models[expert].blocks.modules() if isinstance(module, Linear)]
            assert {layer.exact for layer in layers} == {exact}
            assert {block.self_attn.exact for block in models[expert].blocks} == {exact}


def test_int8_products_are_left_out_of_exact_steps():
    layer = Linear(16, 8)
    layer.keep(KeptWeight(torch.int8, scaled=True), torch.float32)
    layer.weight.data.view(torch.int8).random_(-100, 100, generator=torch.Generator().manual_seed(0))
    layer.weight_scale.data.fill_(0.01)
    layer.bias.data.zero_()
    layer.int8_product = lambda *_: torch.zeros(1)
    x = torch.randn(3, 16)
    assert layer(x).shape == (1,) and not layer.is_plain
    layer.exact = True
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.unpacked_weight())) and layer.is_plain


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_compute_the_same_steps_and_blocks_exactly(folder: Path, tmp_path: Path, world: int):
    """Sharded or not, packed or through each other's memory, step after step."""
    run_ranks("exactness_spread", world, folder=str(folder), memory=str(tmp_path))
