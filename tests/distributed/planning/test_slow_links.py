"""Whether weights are sharded over links that are slower than what else there is."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from plan_inputs import GIB, machine, plan, request, words, workload
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.planning.gpu_memory import estimate
from wan_pack.distributed.planning.policies import COMPUTE, HOST_BYTES, LINK_BYTES, policies, seconds

EIGHT_BITS = {"experts": (14_500_000_000,) * 2, "block_bytes": 352_000_000, "outside_bytes": 420_000_000}


@pytest.mark.parametrize(
    ("free", "wires", "changes", "decision"),
    [
        # An expert fits in 8 bits: the other one waits in host memory, and no weights go over the link.
        (23.0, "pcie", EIGHT_BITS, "0,1 ulysses2 resident offload"),
        (23.0, "host", EIGHT_BITS, "0,1 ulysses2 resident offload"),
        (23.0, "nvlink", EIGHT_BITS, "0,1 ulysses2 fsdp-block"),
        # Fetching experts once costs more than gathering blocks beside four long steps.
        (60.0, "host", {"steps": 4, "width": 1280, "height": 720}, "0,1 ulysses2 fsdp-block"),
        (60.0, "host", {"steps": 40, "width": 1280, "height": 720}, "0,1 ulysses2 resident offload"),
        # Nothing has to be sharded.
        (79.0, "host", {}, "0,1 ulysses2 resident"),
        (60.0, "host", {"experts": (28952279296,)}, "0,1 ulysses2 resident"),
    ],
)
def test_weights_stay_off_slow_links_where_that_is_faster(
    free: float, wires: str, changes: dict[str, Any], decision: str
):
    work = dataclasses.replace(workload(), **changes)
    made = plan(work, request(), machine(free, free), wires)
    assert words(made) == decision
    said = f"offload_model is off, but sharding over the {wires} link is slower, so it is on for this job"
    assert (said in made.reasons) == (decision.endswith("offload"))
    # What was said to be slower is slower.
    sharded = [way for way in policies(work, request(), 2) if way.use_fsdp and not way.offload_model]
    allowed = [way for way in sharded if estimate(work, way).total <= free * GIB]
    if decision.endswith("offload"):
        assert made.level == 0 and all(seconds(work, way, wires, wires) > made.seconds for way in allowed)


def test_sharding_stays_where_the_host_has_no_room_or_nothing_else_is_asked_for():
    work = dataclasses.replace(workload(), **EIGHT_BITS)
    held = request(keep_warm_seconds=60.0)
    made = plan(work, held, machine(23.0, 23.0), "host", host_bytes=20 * GIB)
    assert words(made) == "0,1 ulysses2 fsdp-block" and "offload_model" not in made.block()
    # Both on two GPUs, in pinned memory of their own.
    assert words(plan(work, held, machine(23.0, 23.0), "host", host_bytes=60 * GIB)).endswith("offload")
    # A block goes past the other GPU's exchange on one bus.
    sharded = Parallel(gpu_count=2, use_fsdp=True, ulysses_engine="packed")
    alone = dataclasses.replace(sharded, use_ulysses=False)
    gathered = work.blocks_bytes / 2 / LINK_BYTES["host"]
    exchanged = 40 * 4 * 16_380 * 5120 * 2 / 2 / LINK_BYTES["host"]
    fast = dataclasses.replace(work, width=64, height=64)
    assert seconds(fast, alone, "host", "host") == pytest.approx(1.06 * 40 * gathered, rel=1e-3)
    assert seconds(work, sharded, "host", "host") >= 1.06 * 40 * (gathered + exchanged) * 0.999


ALONE = Parallel(gpu_count=1)
UNEQUAL = {"experts": (10 * GIB, 30 * GIB), "block_bytes": GIB // 2, "outside_bytes": GIB}


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        # Fetched once each: streamed from the start, or one for the other; the larger of two goes and comes.
        ({"stream_blocks": True}, 40 * GIB / HOST_BYTES),
        ({"gpu_count": 2, "stream_blocks": True}, 2 * 40 * GIB / HOST_BYTES),
        ({"offload_model": True}, 4 * 30 * GIB / HOST_BYTES),
        ({"gpu_count": 2, "offload_model": True}, 4 * 30 * GIB / HOST_BYTES),
        ({"gpu_count": 2, "offload_model": True, "use_fsdp": True, "gather": "expert"},
         2 * 30 * GIB / HOST_BYTES + 20 * GIB / LINK_BYTES["pcie"]),
        # Half of each comes from the other rank, three quarters from three others.
        ({"gpu_count": 2, "use_fsdp": True, "gather": "expert"}, 40 * GIB / 2 / LINK_BYTES["pcie"]),
        ({"gpu_count": 4, "use_fsdp": True, "gather": "expert"}, 40 * GIB * 3 / 4 / LINK_BYTES["pcie"]),
    ],
)  # fmt: skip
def test_what_is_fetched_once_is_added_to_the_steps(settings: dict[str, Any], more: float):
    """Steps that take long enough to hide blocks on their way."""
    work = dataclasses.replace(workload(num_frames=481), **UNEQUAL)
    layout = {"gpu_count": 1, "ulysses_engine": "packed", **settings}
    plain = {**layout, "stream_blocks": False, "offload_model": False, "use_fsdp": False}
    took = seconds(work, Parallel(**layout), "pcie", "pcie") - seconds(work, Parallel(**plain), "pcie", "pcie")
    assert took == pytest.approx(more)
    only = dataclasses.replace(work, experts=work.experts[1:])
    if layout.get("offload_model") and not layout.get("use_fsdp"):
        assert seconds(only, Parallel(**layout), "pcie", "pcie") == seconds(only, Parallel(**plain), "pcie", "pcie")


def test_blocks_on_their_way_are_waited_for_where_they_take_longer_than_a_step():
    """Beside what the ranks exchange where that goes over the same bus."""
    work = dataclasses.replace(workload(width=320, height=192, steps=10), **UNEQUAL)
    layout = {"gpu_count": 2, "ulysses_engine": "packed"}
    tokens = 21 * 12 * 20
    for link, exchanged in (("host", 40 * 4 * tokens / 2 * 5120 * 2 / 2 / LINK_BYTES["host"]), ("nvlink", 0.0)):
        streamed = seconds(work, Parallel(**layout, stream_blocks=True), link, link)
        assert streamed == pytest.approx(10 * (29 * GIB / HOST_BYTES + exchanged) + 80 * GIB / HOST_BYTES)
        gathered = 29 * GIB / 2 / LINK_BYTES["pcie"] + exchanged
        assert seconds(work, Parallel(**layout, use_fsdp=True), link, "pcie") == pytest.approx(10 * gathered * 1.06)


def test_guidance_takes_two_passes_unless_each_half_of_the_gpus_takes_one():
    work, guided = workload(), workload(guided=True)
    half = Parallel(gpu_count=2, cfg_parallel=True)
    once = seconds(work, ALONE, "nvlink", "nvlink")
    assert seconds(guided, ALONE, "nvlink", "nvlink") == pytest.approx(2 * once)
    assert seconds(guided, half, "nvlink", "nvlink") == seconds(work, half, "nvlink", "nvlink") == pytest.approx(once)
    assert seconds(workload(steps=80), ALONE, "nvlink", "nvlink") == pytest.approx(2 * once)
    chunked = dataclasses.replace(ALONE, memory_optimization=True)
    assert seconds(work, chunked, "nvlink", "nvlink") == pytest.approx(1.03 * once)


@pytest.mark.parametrize(("gpus", "heads"), [(2, 20), (3, 14), (4, 10)])
def test_ranks_compute_their_tokens_and_heads_and_exchange_the_rest(gpus: int, heads: int):
    """A symmetric exchange is waited for as far as it is longer than the attention, but for its first part."""
    work = workload(steps=1)
    tokens = -(-32_760 // gpus)
    matrices = 2 * (6 * 5120 + 2 * 13_824) * 5120 * tokens * 40
    attention = 4 * 32_760**2 * 5120 * 40 * heads / 40 / COMPUTE
    for precision, element in (("bf16", 2), ("fp32", 4)):
        for link in ("nvlink", "host"):
            exchange = 40 * 4 * tokens * 5120 * element * (gpus - 1) / gpus / LINK_BYTES[link]
            packed, symmetric = (
                seconds(work, Parallel(gpu_count=gpus, ulysses_engine=engine, mixed_precision=precision), link, link)
                for engine in ("packed", "symmetric")
            )
            assert packed == pytest.approx(matrices / COMPUTE + attention + exchange)
            shown = max(exchange - attention, 0.05 * exchange)
            assert symmetric == pytest.approx(matrices / COMPUTE + attention + shown)
            assert (exchange > attention) is (link == "host")
    whole = seconds(work, Parallel(gpu_count=gpus, use_ulysses=False, use_fsdp=True, gather="expert"), "host", "host")
    assert whole > seconds(work, ALONE, "host", "host")
