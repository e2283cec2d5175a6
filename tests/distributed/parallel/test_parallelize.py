"""How a model computes over a group, and how its weights are divided: engines and FSDP are made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.fsdp as fsdp
from tiny import TINY, TINY_VACE
from torch import nn
from wan_pack.distributed.job.job import FFN_CHUNK, Parallel
from wan_pack.distributed.parallel import parallelize
from wan_pack.distributed.parallel.parallelize import (
    Computing,
    chosen_engine,
    compute_as,
    parallelize_wan,
    set_shard,
    shard_weights,
)
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.parallel.ulysses import Exchange
from wan_pack.wan.model.attention import attention
from wan_pack.wan.model.kernels.choice import OPS
from wan_pack.wan.transformer.transformer import WanModel, meta_model

HALF, WHOLE = SequenceShard(length=12, rank=1, world=2), SequenceShard(length=12)


def exact_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q


class Engine(Exchange):
    """Only notes what it is made with."""

    def __init__(self, *made: Any) -> None:
        self.made, self.shard = made, made[1]

    def __call__(self, *_: Any) -> Any: ...


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of CPU processes, as it seems; all engines are made up."""
    for name in parallelize.ENGINES:
        monkeypatch.setitem(parallelize.ENGINES, name, type(name, (Engine,), {}))
    return SimpleNamespace(ulysses_group="row", world=SimpleNamespace(device_type="cpu"))


def a_model(config: Any = TINY) -> WanModel:
    return meta_model(config, torch.float32)


def layers(model: WanModel) -> list[Any]:
    return [block.self_attn for block in model.running_order]


@pytest.mark.parametrize(
    ("asked", "device", "engine"),
    [("auto", "cuda", "symmetric"), ("auto", "cpu", "packed"), ("packed", "cuda", "packed"),
     ("symmetric", "cpu", "symmetric"), ("deepspeed", "cuda", "deepspeed")],
)  # fmt: skip
def test_an_engine_is_chosen_by_the_device_where_nobody_has(asked: str, device: str, engine: str, mesh: Any) -> None:
    assert chosen_engine(asked, device) == engine
    mesh.world.device_type = device
    model = a_model()
    compute_as(model, mesh, HALF, Computing.of(Parallel(gpu_count=2, ulysses_engine=asked), attention, "plain"))
    (made,) = {layer.attention for layer in layers(model)}
    assert type(made).__name__ == engine and made.made == ("row", HALF, attention)
    assert all(layer.exact_attention is None for layer in layers(model))


def test_another_video_has_another_length_for_every_engine_and_for_kernels_nothing(mesh: Any) -> None:
    model = a_model()
    how = Computing.of(Parallel(gpu_count=2), attention, "plain", exact_attention)
    compute_as(model, mesh, HALF, how)
    other = SequenceShard(length=99, rank=1, world=2)
    set_shard(model, other)
    for layer in layers(model):
        assert layer.attention.shard is layer.exact_attention.shard is other
        assert layer.attention is layers(model)[0].attention and layer.exact_attention.made[2] is exact_attention
    compute_as(model, None, WHOLE, how)
    set_shard(model, other)
    assert not any(isinstance(layer.attention, Exchange) for layer in layers(model))


@pytest.mark.parametrize("said", ["by a job", "one by one"])
def test_all_that_is_said_reaches_the_blocks(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: ("compiled", function))
    monkeypatch.setitem(OPS, "own", lambda: "arithmetic")
    model, shards = a_model(TINY_VACE), []
    model.set_reshard_after_forward = shards.append  # type: ignore[operator]
    settings: dict[str, Any] = {
        "ulysses_engine": "packed", "torch_compile": True, "memory_optimization": True, "gather": "expert",
    }  # fmt: skip
    if said == "by a job":
        job = Parallel(gpu_count=1, exact_blocks="1,3", **settings)
        compute_as(model, None, WHOLE, Computing.of(job, attention, "own", exact_attention))
    else:
        parallelize_wan(
            model, None, shard=WHOLE, attention=attention, use_fsdp=True, ops="own", exact_attention=exact_attention,
            exact_blocks=(1, 3), **settings,
        )  # fmt: skip
    assert shards == [False]
    exact = [
        name for name, block in zip(model.config.block_names, model.running_order, strict=True) if block.always_exact
    ]
    assert exact == sorted(model.config.with_vace_blocks((1, 3)), key=model.config.block_names.index)
    for block in model.running_order:
        assert block.ops == "arithmetic" and block.ffn_chunk == FFN_CHUNK
        assert block.self_attn.exact_attention is not None
        for part, name in ((block, "attention_inputs"), (block, "summed_inputs"), (block, "attention_outputs"),
                           (block.self_attn, "queries_keys_values")):  # fmt: skip
            assert vars(part)[name][0] == "compiled"
    compute_as(model, None, WHOLE, Computing.of(Parallel(gpu_count=1), attention, "own"))
    assert shards == [False, True]
    assert all("summed_inputs" not in vars(block) and block.ffn_chunk is None for block in model.running_order)


@pytest.mark.parametrize("gather", ["block", "expert"])
def test_each_unit_is_sharded_before_the_whole_and_asks_for_the_next_one(
    gather: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, mesh = a_model(), SimpleNamespace(world="line")
    made: list[tuple[Any, ...]] = []

    def fully_shard(module: nn.Module, **how: Any) -> nn.Module:
        made.append((module, how))
        module.set_modules_to_forward_prefetch = lambda names: asked.append((module, names))  # type: ignore
        return module

    asked: list[tuple[Any, Any]] = []
    monkeypatch.setattr(fsdp, "fully_shard", fully_shard)
    shard_weights(model, mesh, gather)  # type: ignore[arg-type]
    how = {"mesh": "line", "reshard_after_forward": gather == "block"}
    assert made == [(module, how) for module in (*model.units, model)]
    assert asked == [(one, [model.units[place + 1]]) for place, one in enumerate(model.units[:-1])]
    asked.clear()
    made.clear()
    for use_fsdp, group in ((True, None), (False, mesh), (True, mesh)):
        settings = {"ulysses_engine": "packed", "torch_compile": False, "memory_optimization": False}
        parallelize_wan(
            a_model(), group, shard=WHOLE, attention=attention, use_fsdp=use_fsdp, gather=gather, **settings
        )  # type: ignore[arg-type]
    assert len(made) == len(model.units) + 1 and made[0][1] == how
