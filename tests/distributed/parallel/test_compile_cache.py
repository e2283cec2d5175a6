"""What was compiled is kept for other sizes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny import TINY, random_weights
from torch._dynamo.utils import counters
from wan_pack.distributed.job.job import FFN_CHUNK, Parallel
from wan_pack.distributed.parallel.parallelize import Computing, compute_as, parallelize_wan
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.wan.model.attention import attention
from wan_pack.wan.model.rope import rope_table
from wan_pack.wan.transformer.transformer import meta_model


def test_a_segment_compiles_for_its_first_size_and_then_once_for_all_others(monkeypatch: pytest.MonkeyPatch):
    """All blocks share a graph; no later video size waits for the compiler."""
    # What makes graphs is counted; making kernels of them takes a minute here.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = meta_model(TINY, torch.float32)
    model.load_state_dict(random_weights(), assign=True)
    parallelize_wan(
        model, None, shard=SequenceShard(length=6), attention=attention, use_fsdp=False, ulysses_engine="packed",
        torch_compile=True, memory_optimization=False,
    )  # fmt: skip
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for tokens in (6, 9, 14, 11):
        for block in model.blocks:
            normed = block.attention_inputs(torch.randn(tokens, TINY.dim), torch.randn(1, 6, TINY.dim), None)
            block.self_attn.queries_keys_values(normed, rope_table((1, 1, tokens), 8), block.ops.rotate)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [2, 4, 4, 4]
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_a_model_computes_in_another_way_and_back():
    """Nothing of the way before is left, nor made twice."""
    model, shard = meta_model(TINY, torch.float32), SequenceShard(length=6)
    settings = {"use_fsdp": False, "ulysses_engine": "packed", "memory_optimization": False}
    parallelize_wan(model, None, shard=shard, attention=attention, torch_compile=False, **settings)
    ways = [
        Computing.of(Parallel(gpu_count=1, torch_compile=compiled, memory_optimization=chunked), attention, "plain")
        for compiled in (False, True)
        for chunked in (False, True)
    ]
    made: set[object] = set()
    for way in (*ways, *reversed(ways)):
        compute_as(model, None, shard, way)
        for block in model.blocks:
            assert block.ffn_chunk == (FFN_CHUNK if way.memory_optimization else None)
            replaced = {name: vars(part).get(name) for part, name in (
                (block, "attention_inputs"), (block.self_attn, "queries_keys_values"), (block, "attention_outputs"),
            )}  # fmt: skip
            assert all((segment is not None) is way.torch_compile for segment in replaced.values())
            made |= {segment for segment in replaced.values() if segment is not None}
    assert len(made) == 3 * len(model.blocks)
