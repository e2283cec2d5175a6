"""What a camera takes beside the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_inputs import workload
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.planning import gpu_memory as memory


def test_what_is_kept_of_a_camera_is_counted():
    """It is as large as the tokens in the compute dtype."""
    plain = workload(experts=1)
    work = replace(plain, config=replace(plain.config, in_dim=36, parts=frozenset({"control_adapter"})))
    for parallel in (Parallel(gpu_count=1), Parallel(gpu_count=4)):
        more = memory.activation_bytes(work, parallel) - memory.activation_bytes(plain, parallel)
        assert more == pytest.approx(memory.rank_tokens(work, parallel) * 5120 * 2, abs=1)
    sparing = Parallel(gpu_count=1, memory_optimization=True)
    assert memory.activation_bytes(work, sparing) == memory.activation_bytes(plain, sparing)
