"""Applies sequence parallelism, compilation and sharding to the model, from outside."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.distributed as dist

from ...wan.model.attention import Attention
from ...wan.model.kernels.choice import OPS
from ...wan.transformer.self_attention import TokenAttention, local_attention
from ...wan.transformer.transformer import WanModel
from ..job.job import FFN_CHUNK, Parallel
from ..job.setting import numbers_in
from ..job.switches import ULYSSES_ENGINES
from .mesh import Mesh
from .sequence import SequenceShard
from .ulysses import Exchange


class MakeExchange(Protocol):
    def __call__(self, group: dist.ProcessGroup, shard: SequenceShard, attention: Attention) -> Exchange:
        """attention: the kernel, for this rank's heads of all tokens."""


ENGINES: dict[str, MakeExchange] = {
    name: getattr(importlib.import_module(f".{file}", __package__), kind)
    for name, (file, kind) in ULYSSES_ENGINES.items()
}


def chosen_engine(name: str, device_type: str) -> str:
    """A name in `ENGINES`, also for auto where no plan has chosen."""
    if name != "auto":
        return name
    return "symmetric" if device_type == "cuda" else "packed"


def set_shard(model: WanModel, shard: SequenceShard) -> None:
    """Tells a parallelized model which tokens it gets from now on: another video has another length."""
    # One engine serves all blocks; a kernel that knows nothing of ranks needs no telling.
    layer = model.running_order[0].self_attn
    for engine in (layer.attention, layer.exact_attention):
        if isinstance(engine, Exchange):
            engine.shard = shard


@dataclass(frozen=True, kw_only=True, slots=True)
class Computing:
    """How a model computes, wherever its weights lie: as `parallelize_wan` is told it."""

    attention: Attention
    gather: str
    ulysses_engine: str
    torch_compile: bool
    memory_optimization: bool
    ops: str
    exact_attention: Attention | None = None
    exact_blocks: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, parallel: Parallel, attention: Attention, ops: str, exact_attention: Attention | None = None
    ) -> Computing:
        return cls(
            attention=attention, gather=parallel.gather, ulysses_engine=parallel.ulysses_engine,
            torch_compile=parallel.torch_compile, memory_optimization=parallel.memory_optimization, ops=ops,
            exact_attention=exact_attention, exact_blocks=numbers_in(parallel.exact_blocks),
        )  # fmt: skip


def compute_as(model: WanModel, mesh: Mesh | None, shard: SequenceShard, how: Computing) -> None:
    """Has a model compute so over a group of `mesh`, also one that has computed otherwise. Its weights stay where they
    are."""

    def spread(kernel: Attention) -> TokenAttention:
        if shard.world == 1:
            return local_attention(kernel)
        assert mesh is not None, "several ranks have a mesh"
        engine = chosen_engine(how.ulysses_engine, mesh.world.device_type)
        return ENGINES[engine](mesh.ulysses_group, shard, kernel)

    rounded, exact = spread(how.attention), None if how.exact_attention is None else spread(how.exact_attention)
    arithmetic = OPS[how.ops]()
    model.keep_exact(how.exact_blocks)
    for block in model.running_order:
        block.ops = arithmetic
        block.self_attn.attention, block.self_attn.exact_attention = rounded, exact
        block.ffn_chunk = FFN_CHUNK if how.memory_optimization else None
        # Each takes its method's place in the instance.
        for module, name in (
            (block, "attention_inputs"),
            (block, "summed_inputs"),
            (block.self_attn, "queries_keys_values"),
            (block, "attention_outputs"),
        ):
            if how.torch_compile and name not in vars(module):
                setattr(module, name, torch.compile(getattr(module, name)))
            elif not how.torch_compile and name in vars(module):
                delattr(module, name)
    # FSDP's, as in `release_gathered`.
    reshard_after = getattr(model, "set_reshard_after_forward", None)
    if reshard_after is not None:
        reshard_after(how.gather == "block")


def parallelize_wan(
    model: WanModel,
    mesh: Mesh | None,
    *,
    shard: SequenceShard,
    attention: Attention,
    use_fsdp: bool,
    gather: str = "block",
    ulysses_engine: str,
    torch_compile: bool,
    memory_optimization: bool,
    ops: str = "plain",
    exact_attention: Attention | None = None,
    exact_blocks: tuple[int, ...] = (),
) -> None:
    """Changes `model` (on the meta device or not) in place.

    The order matters: attention is replaced first, so that what is compiled never holds a collective; compiled
    segments come before `fully_shard`, so that its hooks gather a block's weights outside of the graph.

    Args:
        mesh: the ranks, or None for one.
        shard: this rank's tokens; a world of 1 there means that every rank runs the whole sequence.
        attention: the kernel of self-attention.
        use_fsdp: shard each block's weights over the mesh.
        gather: block or expert; with "expert" what is gathered stays until `release_gathered`.
        ulysses_engine: a name in `ENGINES`.
        ops: a name in `OPS`: the arithmetic around the matrix products.
        exact_attention: instead of a kernel that rounds to 8 bits, where a step or a block is to be exact.
        exact_blocks: numbers of main blocks that always are.
    """
    how = Computing(
        attention=attention, gather=gather, ulysses_engine=ulysses_engine, torch_compile=torch_compile,
        memory_optimization=memory_optimization, ops=ops, exact_attention=exact_attention, exact_blocks=exact_blocks,
    )  # fmt: skip
    compute_as(model, mesh, shard, how)
    if use_fsdp and mesh is not None:
        shard_weights(model, mesh, gather)


def shard_weights(model: WanModel, mesh: Mesh, gather: str) -> None:
    """Has FSDP shard each block's weights over the mesh. gather: as in `parallelize_wan`."""
    # Here because it takes seconds to import.
    from torch.distributed.fsdp import fully_shard

    drop = gather == "block"
    sharded = [fully_shard(unit, mesh=mesh.world, reshard_after_forward=drop) for unit in model.units]
    # By default the root keeps what it gathered, which offload would then leave on the device.
    fully_shard(model, mesh=mesh.world, reshard_after_forward=drop)
    # Asked for before a block begins, so that its all-to-alls do not queue before the next block's weights.
    for one, following in pairwise(sharded):
        one.set_modules_to_forward_prefetch([following])


def release_gathered(model: WanModel) -> None:
    """Drops what FSDP has gathered and kept; this rank's shards stay. Nothing happens to a model without FSDP."""
    for module in model.modules():
        # FSDP's, known by its method: naming the class would import it, two seconds that only FSDP needs.
        reshard = getattr(module, "reshard", None)
        if reshard is not None:
            reshard()
