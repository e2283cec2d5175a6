"""What a plan counts on of the GPUs' free memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from plan_inputs import GIB, machine, plan, request, words, workload
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.planning import gpu_memory as memory
from wan_pack.distributed.planning.gpu_memory import estimate
from wan_pack.distributed.planning.plan import FREE_STEP


def test_it_is_rounded_down_and_never_to_what_is_not_there():
    work, asked = workload(experts=1), request(use_fsdp=False)
    whole = -(-estimate(work, Parallel(gpu_count=1)).total // FREE_STEP) * FREE_STEP
    for free, resident in ((whole, True), (whole - 1, False)):
        gpu = dataclasses.replace(machine(100.0)[0], free_bytes=free)
        assert (words(plan(work, asked, [gpu])) == "0 ulysses1 resident") is resident


def test_what_would_fit_fits_the_smaller_of_two_as_well():
    equal, unequal = (plan(workload(), request(2), machine(47.0, free), "nvlink") for free in (47.0, 79.0))
    assert (unequal.size, unequal.num_frames) == (equal.size, equal.num_frames)


@pytest.mark.parametrize(
    ("side", "size"), [((832, 480), (8176, 4720)), ((480, 832), (4720, 8176)), ((512, 512), (8192, 8192))]
)
def test_the_largest_size_is_a_jobs_own_and_its_shorter_side_grows_by_tokens(
    side: tuple[int, int], size: tuple[int, int]
):
    work = workload(num_frames=1, width=side[0], height=side[1])
    made = plan(work, request(1), machine(100_000.0))
    assert (made.size, made.num_frames) == (size, 4097)
    for free in (20.0, 27.0, 33.0, 41.0):
        found = plan(dataclasses.replace(work, num_frames=81), request(1), machine(free)).size
        assert found is not None
        short, long = sorted(found)
        assert abs(long - short * max(side) / min(side)) <= 8, "the longer side is rounded to the nearest token"


UNEQUAL: dict[str, Any] = {"experts": (10 * GIB, 30 * GIB), "block_bytes": GIB // 2, "outside_bytes": GIB}


@pytest.mark.parametrize(
    ("settings", "rest", "gathered", "parked"),
    [
        ({}, 40, 0.0, 0), ({"offload_model": True}, 30, 0.0, 60), ({"use_fsdp": True}, 20, 2.5, 0),
        ({"use_fsdp": True, "gather": "expert"}, 20, 30.5, 0),
        ({"use_fsdp": True, "offload_model": True}, 15, 2.5, 30), ({"stream_blocks": True}, 2, 0.0, 80),
    ],
)  # fmt: skip
def test_of_unequal_experts_the_larger_counts(settings: dict[str, Any], rest: int, gathered: float, parked: int):
    """Whichever of the two it is; both are there where both stay."""
    for experts in (UNEQUAL["experts"], UNEQUAL["experts"][::-1]):
        work = dataclasses.replace(workload(), **{**UNEQUAL, "experts": experts})
        parallel = Parallel(gpu_count=2, keep_warm_seconds=1.0, **settings)
        assert memory.weights_at_rest(work, parallel) == rest * GIB
        assert memory.gathered_bytes(work, parallel) == gathered * GIB
        assert memory.parked_bytes(work, parallel) == parked * GIB
        assert work.blocks_bytes == 29 * GIB
        going = dataclasses.replace(parallel, keep_warm_seconds=0.0)
        assert memory.parked_bytes(work, going) == (60 * GIB if "stream_blocks" in settings else 0)
