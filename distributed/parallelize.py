"""Applies sequence parallelism, compilation and sharding to the model, from outside."""

from __future__ import annotations

import torch

from ..wan.attention import Attention
from ..wan.model import WanModel
from .mesh import Mesh
from .sequence import SequenceShard
from .ulysses import ENGINES

FFN_CHUNK = 4096
"""Tokens per feed-forward call under memory optimization: large enough to keep a GPU busy."""


def set_shard(model: WanModel, shard: SequenceShard) -> None:
    """Tells a parallelized model which tokens it gets from now on: another video has another length."""
    # One engine serves all blocks; a kernel that knows nothing of ranks needs no telling.
    engine = model.blocks[0].self_attn.attention
    if hasattr(engine, "shard"):
        engine.shard = shard


def parallelize_wan(
    model: WanModel,
    mesh: Mesh | None,
    *,
    shard: SequenceShard,
    attention: Attention,
    use_fsdp: bool,
    ulysses_engine: str,
    torch_compile: bool,
    memory_optimization: bool,
) -> None:
    """Changes `model` (on the meta device or not) in place.

    The order matters: attention is replaced first, so that what is compiled never holds a collective; compiled
    segments come before `fully_shard`, so that its hooks gather a block's weights outside of the graph.

    Args:
        mesh: the ranks, or None for one.
        shard: this rank's tokens; a world of 1 there means that every rank runs the whole sequence.
        attention: the kernel of self-attention.
        use_fsdp: shard each block's weights over the mesh.
        ulysses_engine: a name in `ENGINES`.
    """
    if shard.world > 1:
        attention = ENGINES[ulysses_engine](mesh.ulysses_group, shard, attention)
    for block in model.blocks:
        block.self_attn.attention = attention
    if memory_optimization:
        for block in model.blocks:
            block.ffn_chunk = FFN_CHUNK
    if torch_compile:
        for block in model.blocks:
            block.attention_inputs = torch.compile(block.attention_inputs)
            block.attention_outputs = torch.compile(block.attention_outputs)
    if use_fsdp and mesh is not None:
        # Here because it takes seconds to import.
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block, mesh=mesh.world)
        # By default the root keeps what it gathered, which offload would then leave on the device.
        fully_shard(model, mesh=mesh.world, reshard_after_forward=True)
