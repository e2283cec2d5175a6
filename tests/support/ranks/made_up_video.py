"""An expert that every rank loads, and its velocity of a made-up video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.rank.expert import load_expert
from wan_pack.wan.model.rope import rope_table
from wan_pack.wan.transformer.animate import Face, Pose
from wan_pack.wan.transformer.conditions import Conditions
from wan_pack.wan.transformer.context import Context, pad_text
from wan_pack.wan.transformer.vace import Control

CPU = torch.device("cpu")


def spread_over(world: int, **settings: Any) -> Parallel:
    return Parallel(gpu_count=world, **{"mixed_precision": "fp32", "use_fsdp": True, **settings})


def tokens_of(parallel: Parallel, rank: int, world: int) -> SequenceShard:
    """This rank's part of the made-up video's 45 tokens."""
    split = parallel.use_ulysses and world > 1
    return SequenceShard(length=45, rank=rank if split else 0, world=world if split else 1)


def load_folder(folder: str, parallel: Parallel, mesh: Any, shard: SequenceShard) -> Any:
    files = sorted(str(file) for file in Path(folder).glob("*.safetensors"))
    return load_expert(files, parallel=parallel, mesh=mesh, shard=shard, device=CPU)


def velocity_by(
    model: Any, parallel: Parallel, mesh: Any, shard: SequenceShard, times: int = 2
) -> tuple[torch.Tensor, int]:
    """The velocity of made-up input, gathered, and how many tokens this rank computed."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(45, 4 * model.config.in_dim, generator=generator)
    rows = torch.randn(9, model.config.text_dim, generator=generator)
    text = Context(pad_text(rows), keep=not parallel.memory_optimization)
    rope = rope_table((3, 3, 5), model.config.head_dim, start=shard.start, stop=shard.stop)
    beside = conditions(model, generator).on_rank(shard.split, shard.length, CPU).beside(keep=text.keep)
    for _ in range(times):  # the second time on kept text
        local = model(shard.split(tokens), torch.tensor([700.0]), text, rope, beside=beside)
    return shard.gather(local, mesh.ulysses_group if mesh else None), local.shape[0]


def conditions(model: Any, generator: torch.Generator) -> Conditions:
    """As many as the model has places for."""

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    config = model.config
    if config.animates:
        # Nothing is told of the last frame.
        picture = Context(noise(257, config.clip_dim))
        return Conditions(picture=picture, pose=Pose(noise(16, 1, 6, 10)), face=Face(noise(3, 1, 512, 512), 3))
    return Conditions(controls=tuple(Control(noise(96, 3, 6, 10), s) for s in (1.0, 0.5)) if config.vace_layers else ())


def velocity_of(folder: str, parallel: Parallel, mesh: Any, rank: int, world: int) -> tuple[torch.Tensor, Any, int]:
    """Loads and evaluates once: the velocity, the model, and how many tokens this rank computed."""
    shard = tokens_of(parallel, rank, world)
    model = load_folder(folder, parallel, mesh, shard)
    velocity, computed = velocity_by(model, parallel, mesh, shard)
    return velocity, model, computed
