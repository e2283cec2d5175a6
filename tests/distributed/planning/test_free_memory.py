"""What a plan counts on of the GPUs' free memory."""

from __future__ import annotations

import dataclasses

from plan_inputs import machine, plan, request, words, workload
from wan_pack.distributed.job.job import Parallel
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
