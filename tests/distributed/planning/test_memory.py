"""The estimate of GPU memory against what was measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planning import A14B, GIB, KINDS, workload
from tiny import TINY
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.parallel.parallelize import parallelize_wan
from wan_pack.distributed.parallel.sequence import SequenceShard, split_evenly
from wan_pack.distributed.parallel.symmetric import _Layout
from wan_pack.distributed.planning import gpu_memory as memory
from wan_pack.distributed.planning.gpu_memory import estimate
from wan_pack.wan.model.attention import attention
from wan_pack.wan.model.transformer import WanModel

MEASURED: list[tuple[dict[str, Any], float]] = [
    # Peaks of torch's allocator on H200, T2V-A14B at 832x480x81 without guidance: benchmarks/results.jsonl.
    ({"gpu_count": 1}, 59.24),
    ({"gpu_count": 1, "torch_compile": True}, 58.21),
    ({"gpu_count": 2}, 56.88),
    ({"gpu_count": 2, "torch_compile": True}, 56.37),
    ({"gpu_count": 2, "use_fsdp": True}, 32.56),
    ({"gpu_count": 2, "use_fsdp": True, "torch_compile": True}, 32.04),
    ({"gpu_count": 2, "use_fsdp": True, "offload_model": True, "memory_optimization": True}, 18.35),
    ({"gpu_count": 2, "keep_warm_seconds": 60.0}, 57.12),
]


@pytest.mark.parametrize(("settings", "gib"), MEASURED)
def test_measured_peaks(settings: dict[str, Any], gib: float):
    assert estimate(workload(), Parallel(**settings)).torch_peak / GIB == pytest.approx(gib, rel=0.03)


def test_the_weights_are_those_of_the_real_model():
    """The sizes that these tests work with, against the model itself."""
    import torch
    from wan_pack.wan.model.config import WAN_CONFIGS
    from wan_pack.wan.model.transformer import meta_model

    for name, (expert, block, _) in KINDS.items():
        model = meta_model(WAN_CONFIGS[name], torch.bfloat16)
        assert sum(p.nbytes for p in model.parameters()) == expert
        assert sum(p.nbytes for p in model.blocks[0].parameters()) == block


def test_each_policy_takes_less_than_the_one_before():
    """On four GPUs: whole, gathered by expert, by block, and with the idle expert parked."""
    ways = [
        {}, {"use_fsdp": True, "gather": "expert"}, {"use_fsdp": True},
        {"use_fsdp": True, "offload_model": True},
        {"use_fsdp": True, "offload_model": True, "memory_optimization": True},
    ]  # fmt: skip
    totals = [estimate(workload(), Parallel(gpu_count=4, **way)).total for way in ways]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == len(totals)


def test_streaming_holds_two_blocks():
    work = workload()
    parallel = Parallel(gpu_count=1, stream_blocks=True, offload_model=True)
    assert estimate(work, parallel).weights == work.outside_bytes + 2 * A14B[1]
    assert memory.parked_bytes(work, parallel) == A14B[0]


def test_processes_that_stay_keep_what_others_drop():
    work = workload()
    for waits, warm, cold in (({"stream_blocks": True}, 2 * A14B[0], A14B[0]), ({"offload_model": True}, A14B[0], 0)):
        for stays in ({"keep_warm_seconds": 60.0}, {"more_follow": True}):
            assert memory.parked_bytes(work, Parallel(gpu_count=1, **stays, **waits)) == warm
        assert memory.parked_bytes(work, Parallel(gpu_count=1, **waits)) == cold


@pytest.mark.parametrize(
    ("change", "grows"),
    [
        ({"guided": True}, "text"),
        ({"given_frames": True}, "activations"),
        ({"fp8": True}, "activations"),
        ({"num_frames": 121}, "activations"),
    ],
)
def test_what_a_video_needs_more_of(change: dict[str, Any], grows: str):
    parallel = Parallel(gpu_count=1)
    before, after = estimate(workload(), parallel), estimate(workload(**change), parallel)
    assert getattr(after, grows) > getattr(before, grows)


def test_the_phase_that_takes_most_counts():
    """A text encoder larger than everything else; a VAE beside nothing; both beside experts that stay warm."""
    parallel, streamed = Parallel(gpu_count=1), Parallel(gpu_count=1, stream_blocks=True, offload_model=True)
    text = estimate(workload(text_bytes=100 * GIB), parallel)
    assert (text.text, text.weights, text.activations) == (100 * GIB, 0, 0)
    large = estimate(workload(width=1280, height=720), streamed)
    assert large.activations or large.vae > 10 * GIB
    for stays in ({"keep_warm_seconds": 1.0}, {"more_follow": True}):
        warm = estimate(workload(text_bytes=100 * GIB), Parallel(gpu_count=1, **stays))
        assert warm.weights == 2 * A14B[0]


@pytest.mark.parametrize("gpus", [2, 3, 4])
def test_an_exchange_through_the_others_memory_is_counted(gpus: int):
    """What it lays out, as long as it is held: a process that stays keeps it beside the next text encoder."""
    work = workload()
    shard, heads = SequenceShard(length=work.tokens, world=gpus), split_evenly(work.config.num_heads, gpus)
    laid_out = _Layout.nbytes(shard, heads, work.config.head_dim, [torch.bfloat16] * 3)
    under_way = 2 * shard.size * work.config.dim * 2
    asked = {"gpu_count": gpus, "ulysses_engine": "symmetric"}
    counted = memory.peer_bytes(work, Parallel(**asked))
    assert laid_out + under_way * (gpus - 1) // gpus <= counted <= 1.01 * (laid_out + under_way)
    for text_bytes, warm, held in ((0, 0.0, counted), (100 * GIB, 0.0, 0), (100 * GIB, 60.0, counted)):
        ways = (
            Parallel(**asked | {"ulysses_engine": engine}, keep_warm_seconds=warm) for engine in ("symmetric", "packed")
        )
        more, less = (estimate(workload(text_bytes=text_bytes), way).total for way in ways)
        assert more - less == held, (text_bytes, warm)


def test_the_feed_forward_is_chunked_as_estimated():
    with torch.device("meta"):
        model = WanModel(TINY)
    parallelize_wan(
        model, None, shard=SequenceShard(length=45), attention=attention, use_fsdp=False, ulysses_engine="packed",
        torch_compile=False, memory_optimization=True,
    )  # fmt: skip
    assert {block.ffn_chunk for block in model.blocks} == {memory.FFN_CHUNK}
