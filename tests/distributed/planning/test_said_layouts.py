"""How a plan's layout is said in words."""

from __future__ import annotations

from typing import Any

import pytest
from plan_inputs import machine, plan, request, workload
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.planning.plan import as_set


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gpu_count": 2, "use_fsdp": True},
         "2 processes (Ulysses 2); weights sharded (FSDP), gathered one block at a time"),
        ({"use_fsdp": True}, "one process; weights whole"),
        ({"gpu_ids": ("3",)}, "GPU 3; weights whole"),
        ({"gpu_count": 2, "gpu_ids": ("3", "1")}, "GPUs 3, 1 (Ulysses 2); weights whole on each"),
        ({"gpu_count": 2, "use_ulysses": False, "use_fsdp": True, "gather": "expert"},
         "2 processes (each the whole sequence); weights sharded (FSDP), gathered one expert at a time"),
        ({"gpu_count": 4, "cfg_parallel": True}, "4 processes (CFG parallel 2 x Ulysses 2); weights whole on each"),
        ({"stream_blocks": True, "offload_model": True}, "one process; blocks streamed from host memory"),
        ({"offload_model": True}, "one process; weights whole, the idle expert in host memory"),
        ({"memory_optimization": True}, "one process; weights whole, memory optimization"),
    ],
)  # fmt: skip
def test_switches_as_set_are_said_with_their_reason_alone(settings: dict[str, Any], said: str):
    parallel = Parallel(**{"gpu_count": 1, **settings})
    made = as_set(parallel, "there is no GPU")
    assert made.parallel is parallel
    assert made.block() == f"plan: {said}\nbecause there is no GPU"


@pytest.mark.parametrize("chosen", [True, False])
def test_less_memory_for_more_time_is_a_reason_where_nobody_asked_for_it(chosen: bool):
    """On a card that streams blocks and has too little for kept keys and values of two prompts."""
    work = workload(width=1280, height=720, decode=False, guided=True)
    made = plan(work, request(1, memory_optimization=chosen, stream_blocks=True), machine(14.0), "host")
    assert made.parallel.memory_optimization
    reason = "memory_optimization is off, but needed here, so it is on for this job"
    assert (reason in made.reasons) is not chosen


def test_numbers_of_gpus_that_do_not_go_are_named_from_the_least():
    asked = request(use_ulysses=False, use_fsdp=False, ulysses_engine="deepspeed", cfg_parallel="on")
    words = (
        "no number of GPUs from 1 to 1 goes with cfg_parallel on, use_ulysses False, use_fsdp False and ulysses_engine "
        "deepspeed; change one of them"
    )
    with pytest.raises(ValueError, match=words):
        plan(workload(), asked, machine(79.0))
