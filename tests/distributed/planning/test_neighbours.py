"""GPUs that share a sequence stand in the order of their links."""

from __future__ import annotations

from itertools import pairwise

from plan_inputs import Wires, machine, plan, request, workload
from wan_pack.distributed.planning.policies import seconds


class Chain(Wires):
    """Each GPU is linked with the one before it and the one behind it."""

    def __init__(self, *gpus: str) -> None:
        super().__init__("host")
        self._linked = {frozenset(pair) for pair in pairwise(gpus)}

    def link(self, index_a: str, index_b: str) -> str:
        return "nvlink" if frozenset((index_a, index_b)) in self._linked else self.kind


def test_each_gpu_is_followed_by_the_one_that_it_is_linked_with():
    made = plan(workload(), request(gpu_count=4), machine(*[79.0] * 4), Chain("0", "2", "3", "1"))
    assert made.parallel.gpu_ids == ("0", "2", "3", "1")


def test_the_slowest_of_the_groups_that_share_a_sequence_counts():
    """With CFG parallelism 0 and 1 exchange by NVLink, 2 and 3 through the host: all wait for these."""
    work = workload(guided=True)
    made = plan(work, request(4, cfg_parallel="on", always_guided=True), machine(*[79.0] * 4), Chain("0", "1"))
    assert set(made.parallel.gpu_ids[:2]) in ({"0", "1"}, {"2", "3"})
    assert made.seconds == seconds(work, made.parallel, "host", "host") > seconds(work, made.parallel, "nvlink", "host")
