"""Whether weights are sharded over links that are slower than what else there is."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from plan_inputs import GIB, machine, plan, request, words, workload
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.planning.gpu_memory import estimate
from wan_pack.distributed.planning.policies import LINK_BYTES, policies, seconds

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
