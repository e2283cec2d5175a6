"""The estimate of GPU memory against what was measured."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from plan_inputs import A14B, GIB, KINDS, workload
from tiny import TINY
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.parallel.memory_layout import MemoryLayout
from wan_pack.distributed.parallel.parallelize import parallelize_wan
from wan_pack.distributed.parallel.sequence import SequenceShard, split_evenly
from wan_pack.distributed.planning import gpu_memory as memory
from wan_pack.distributed.planning.gpu_memory import estimate, vae_decode_bytes
from wan_pack.wan.model.attention import attention
from wan_pack.wan.transformer.transformer import WanModel

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
    found = estimate(workload(), Parallel(**settings))
    assert (found.total - found.process) / GIB == pytest.approx(gib, rel=0.03)


def test_the_weights_are_those_of_the_real_model():
    """The sizes that these tests work with, against the model itself."""
    import torch
    from wan_pack.benchmarks.released_sizes import WAN_CONFIGS
    from wan_pack.wan.transformer.transformer import meta_model

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
    work = workload(decode=False)
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
        ({"unpacked": True}, "activations"),
        ({"num_frames": 121}, "activations"),
    ],
)
def test_what_a_video_needs_more_of(change: dict[str, Any], grows: str):
    parallel = Parallel(gpu_count=1)
    before, after = estimate(workload(), parallel), estimate(workload(**change), parallel)
    assert getattr(after, grows) > getattr(before, grows)


def test_a_vae_of_twice_the_size_holds_more_frames():
    """Those of all rows, on the GPU that gathers them; what it computes on is of the video's size."""
    pixels = 832 * 480
    for mixed_precision, width in (("bf16", 2), ("fp32", 4)):
        parallel = Parallel(gpu_count=4, mixed_precision=mixed_precision)
        once, twice = (vae_decode_bytes(workload(vae_upscale=scale), parallel) for scale in (1, 2))
        assert twice - once == 3 * pixels * 16 * 3 * width
    streamed = Parallel(gpu_count=1, stream_blocks=True, offload_model=True, memory_optimization=True)
    once, twice = (estimate(workload(width=1280, height=720, vae_upscale=scale), streamed) for scale in (1, 2))
    assert twice.vae > once.vae and twice.total > once.total


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
    laid_out = MemoryLayout.nbytes(shard, heads, work.config.head_dim, [torch.bfloat16] * 3)
    under_way = 3 * shard.size * work.config.dim * 2
    asked = {"gpu_count": gpus, "ulysses_engine": "symmetric"}
    counted = memory.peer_bytes(work, Parallel(**asked))
    assert counted == pytest.approx(laid_out + under_way, rel=0.01)
    codes = [memory.peer_bytes(work, Parallel(**asked, attention="fa3-fp8", exact_steps=n)) for n in (0, 1)]
    assert codes == [counted, counted + 2 * shard.size * work.config.dim * 2], "of q and k, where others send none"
    assert memory.peer_bytes(work, Parallel(**asked, exact_steps=1, exact_blocks="0")) == counted, "nothing is rounded"
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


S_C = 32_760 * 5_120
"""Tokens times channels of T2V-A14B at 832x480x81."""
ROTARY = 32_760 * 128 * 4


@pytest.mark.parametrize(
    ("settings", "changes", "units", "more"),
    [
        # By hand. Fullest behind the attention: residual 8, five of 2 bytes, the feed-forward's 2.7 twice in bf16.
        ({}, {}, 8 + 10 + 10.8, 0),
        ({"torch_compile": True}, {}, 8 + 10 + 5.4, 0),
        ({"mixed_precision": "fp32"}, {}, 8 + 20 + 21.6, 0),
        # 4096 tokens at a time, with room for the parts: then q and k before the attention, 24 + 4, are as much.
        ({"memory_optimization": True}, {}, 28, 0),
        ({"memory_optimization": True, "torch_compile": True}, {}, 8 + 10 + 5.4 / 8 + 4, 0),
        ({}, {"given_frames": True}, 8 + 10 + 10.8 + 24, 0),
        ({"torch_compile": True}, {"given_frames": True}, 8 + 10 + 5.4 + 24, 0),
        # One feed-forward weight unpacked.
        ({}, {"unpacked": True}, 8 + 10 + 10.8, 13_824 * 5_120 * 2),
    ],
)
def test_activations_are_those_of_the_fullest_moment(
    settings: dict[str, Any], changes: dict[str, Any], units: float, more: int
):
    parallel = Parallel(**{"gpu_count": 1, **settings})
    expected = units * S_C + ROTARY + more
    assert memory.activation_bytes(workload(**changes), parallel) == pytest.approx(expected, rel=2e-3)


def test_two_gpus_hold_half_of_the_tokens_and_what_they_exchange():
    """With a short feed-forward q, k and v, three times, are the fullest: 4 and ten of 2 bytes; on one GPU 12."""
    work = workload()
    work = dataclasses.replace(work, config=dataclasses.replace(work.config, ffn_dim=512))
    compiled = {"torch_compile": True}
    two = memory.activation_bytes(work, Parallel(gpu_count=2, **compiled))
    assert two == pytest.approx(24 * S_C / 2 + ROTARY / 2, rel=2e-3)
    assert memory.activation_bytes(work, Parallel(gpu_count=1, **compiled)) == pytest.approx(
        max(16, 8 + 10 + 0.2) * S_C + ROTARY, rel=2e-3
    )
    odd = dataclasses.replace(work, width=16, height=16, num_frames=1)
    assert memory.rank_tokens(odd, Parallel(gpu_count=2)) == 1
    assert memory.rank_tokens(workload(), Parallel(gpu_count=7)) == 4680
    assert memory.rank_tokens(workload(num_frames=77), Parallel(gpu_count=7)) == 4458


def test_weights_that_wait_in_host_memory_are_those_of_all_processes():
    expert = A14B[0]
    for settings, experts in (
        ({}, 0), ({"offload_model": True}, 0), ({"offload_model": True, "keep_warm_seconds": 1.0}, 2),
        ({"offload_model": True, "keep_warm_seconds": 1.0, "use_fsdp": True}, 1), ({"stream_blocks": True}, 2),
        ({"stream_blocks": True, "keep_warm_seconds": 1.0}, 4),
    ):  # fmt: skip
        assert memory.parked_bytes(workload(), Parallel(gpu_count=2, **settings)) == experts * expert, settings
    warm = Parallel(gpu_count=2, use_fsdp=True, offload_model=True, keep_warm_seconds=1.0)
    assert memory.parked_bytes(dataclasses.replace(workload(), experts=(GIB, 3 * GIB)), warm) == 3 * GIB
    alone = Parallel(gpu_count=2, offload_model=True, keep_warm_seconds=1.0)
    assert memory.parked_bytes(workload(experts=1), alone) == 0


def test_weights_on_a_gpu():
    expert, block, _ = A14B
    outside = expert - 40 * block
    for settings, rest, gathered in (
        ({}, 2 * expert, 0), ({"offload_model": True}, expert, 0), ({"use_fsdp": True}, expert, outside + 3 * block),
        ({"use_fsdp": True, "gather": "expert"}, expert, expert + block),
        ({"use_fsdp": True, "offload_model": True}, expert // 2, outside + 3 * block),
        ({"stream_blocks": True}, outside + 2 * block, 0),
    ):  # fmt: skip
        parallel = Parallel(gpu_count=2, **settings)
        assert memory.weights_at_rest(workload(), parallel) == rest, settings
        assert memory.gathered_bytes(workload(), parallel) == gathered, settings
    assert memory.gathered_bytes(workload(), Parallel(gpu_count=1, use_fsdp=True)) == 0


def test_kept_text_is_two_tensors_of_every_block_and_prompt():
    one = 2 * 40 * 512 * 5120 * 2
    for settings, guided, expected in (
        ({}, False, one), ({}, True, 2 * one), ({"cfg_parallel": True}, True, one),
        ({"mixed_precision": "fp32"}, False, 2 * one), ({"memory_optimization": True}, True, 0),
    ):  # fmt: skip
        assert memory.kept_text_bytes(workload(guided=guided), Parallel(gpu_count=2, **settings)) == expected


def test_processes_that_stay_keep_their_weights_while_the_rest_runs():
    """Encoding a prompt on GPUs that hold the model already is the fullest moment there."""
    text = 90 * GIB
    cold, warm = (
        estimate(workload(text_bytes=text), Parallel(gpu_count=1, keep_warm_seconds=seconds)) for seconds in (0.0, 1.0)
    )
    assert (cold.weights, warm.weights) == (0, 2 * A14B[0])
    assert cold.text == warm.text == text
    assert estimate(workload(decode=False), Parallel(gpu_count=1)).weights == 2 * A14B[0]


def test_vace_blocks_are_counted():
    """Eight more of a 14B model: weights, kept text, streams beside the main one, and reference frames as tokens."""
    from dataclasses import replace

    import torch
    from wan_pack.wan.transformer.transformer import meta_model

    plain = workload(experts=1)
    config = replace(plain.config, parts=frozenset({"vace_blocks"}), vace_layers=tuple(range(0, 40, 5)))
    model = meta_model(config, torch.bfloat16)
    sizes = [sum(p.nbytes for p in block.parameters()) for block in model.running_order]
    whole = sum(p.nbytes for p in model.parameters())
    vace = replace(
        plain, config=config, experts=(whole,), block_bytes=max(sizes), outside_bytes=whole - sum(sizes), controls=1
    )
    assert vace.blocks_bytes == sum(sizes) and vace.block_runs == 48
    one = Parallel(gpu_count=1)
    for parallel in (one, Parallel(gpu_count=2, use_fsdp=True), Parallel(gpu_count=1, stream_blocks=True)):
        assert estimate(vace, parallel).total > estimate(plain, parallel).total
    assert memory.kept_text_bytes(vace, one) == memory.kept_text_bytes(plain, one) * 48 // 40
    streams = memory.activation_bytes(vace, one) - memory.activation_bytes(plain, one)
    assert streams == pytest.approx(plain.tokens * (4 * 5120 + 4 * 4 * 96), rel=1e-6)
    assert memory.activation_bytes(replace(vace, controls=2), one) - memory.activation_bytes(vace, one) == streams
    assert replace(vace, references=2).tokens == plain.tokens * 23 // 21
    work = estimate(replace(vace, references=2), one)
    assert work.activations > estimate(vace, one).activations


def test_kept_pictures_are_counted():
    from dataclasses import replace

    plain = workload(experts=1)
    one = Parallel(gpu_count=1)
    for parts, rows in ((frozenset({"img_emb"}), 257), (frozenset({"img_emb", "emb_pos"}), 514)):
        work = replace(plain, config=replace(plain.config, parts=parts))
        more = memory.kept_text_bytes(work, one) - memory.kept_text_bytes(plain, one)
        assert more == 2 * 40 * rows * 5120 * 2


@pytest.mark.parametrize(
    "settings",
    [{}, {"cfg_parallel": True}, {"use_fsdp": True}, {"memory_optimization": True}, {"ulysses_engine": "symmetric"}],
)
def test_what_an_evaluation_takes_is_what_its_plan_counts_beside_weights_and_process(settings: dict[str, Any]):
    work = workload(experts=1, vae_bytes=0, guided=True, decode=False)
    parallel = Parallel(gpu_count=2, **settings)
    beside = memory.weights_at_rest(work, parallel) + memory.process_bytes(parallel)
    assert memory.evaluation_bytes(work, parallel) == estimate(work, parallel).total - beside
