"""How a job is laid out on machines that this one is not."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from plan_inputs import Wires, machine, plan, request, words, workload
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.planning import plan as planning
from wan_pack.distributed.planning.gpu_memory import GIB, estimate
from wan_pack.distributed.planning.plan import DoesNotFit, as_set, rank
from wan_pack.distributed.planning.policies import COMPUTE, HOST_BYTES, LINK_BYTES, policies, seconds

GUIDED = {"always_guided": True}
TEXT = 11_400_000_000


@pytest.mark.parametrize(
    ("free", "wires", "asked", "decision"),
    [
        ([140.0], "nvlink", {}, "0 ulysses1 resident"),
        ([79.0] * 8, "nvlink", GUIDED, "0,1,2,3,4,5,6,7 cfg ulysses4 resident"),
        ([47.0] * 4, "nvlink", {}, "0,1,2,3 ulysses4 fsdp-expert"),
        ([39.0] * 4, "nvlink", {}, "0,1,2,3 ulysses4 fsdp-block"),
        ([47.0] * 2, "host", {}, "0,1 ulysses2 resident offload"),
        ([47.0], "host", {}, "0 ulysses1 resident offload"),
        ([23.0] * 2, "host", {}, "0,1 ulysses2 stream"),
        ([23.0] * 2, "nvlink", {}, "0,1 ulysses2 fsdp-block offload"),
        ([23.0], "host", {}, "0 ulysses1 stream"),
        ([15.0], "host", {}, "0 ulysses1 stream"),
        ([79.0, 79.0, 10.0], "nvlink", {}, "0,1 ulysses2 resident"),
        ([31.0, 79.0], "host", {"use_fsdp": False}, "1 ulysses1 resident"),
        ([47.0] * 2, "host", {"use_fsdp": False}, "0,1 ulysses2 resident offload"),
        ([79.0] * 4, "nvlink", {"use_ulysses": False, "use_fsdp": False}, "0 whole resident"),
        ([79.0] * 4, "nvlink", {"gpu_count": 3}, "0,1,2 ulysses3 resident"),
    ],
)
def test_decisions(free: list[float], wires: str, asked: dict[str, Any], decision: str):
    """T2V-A14B, 832x480, 81 frames, on GPUs with so many GiB free and links of one kind."""
    assert words(plan(workload(guided="always_guided" in asked), request(**asked), machine(*free), wires)) == decision


@pytest.mark.parametrize(
    ("asked", "decision"),
    [
        # Of four GPUs in two pairs, two that are linked; of all four, pairs share a sequence.
        ({"gpu_count": 2}, "0,1 ulysses2 resident"),
        (GUIDED, "0,1,2,3 cfg ulysses2 resident"),
    ],
)
def test_gpus_with_fast_links_work_together(asked: dict[str, Any], decision: str):
    work, wires = workload(guided=True), Wires("host", pairs=True)
    assert words(plan(work, request(**asked), machine(*[79.0] * 4), wires)) == decision
    # The same pairs in the listing's other order: 0 with 2, 1 with 3.
    crossed = [dataclasses.replace(gpu, index=index) for gpu, index in zip(machine(*[79.0] * 4), "0213", strict=True)]
    ids = plan(work, request(**asked), crossed, wires).parallel.gpu_ids
    assert abs(int(ids[0]) - int(ids[1])) == 1


def test_switches_that_are_on_stay_on():
    base = {"offload_model": True, "memory_optimization": True}
    assert words(plan(workload(), request(**base), machine(140.0))) == "0 ulysses1 resident offload chunked"
    assert words(plan(workload(), request(stream_blocks=True), machine(140.0))) == "0 ulysses1 stream"


@pytest.mark.parametrize(("gpus", "wires"), [(1, "host"), (2, "nvlink"), (4, "unknown"), (8, "pcie"), (8, "host")])
def test_more_memory_never_leads_to_a_worse_plan(gpus: int, wires: str):
    asked, ranks = request(always_guided=True), []
    for free in (10, 14, 18, 23, 27, 31, 39, 47, 60, 79, 140):
        try:
            ranks.append(rank(plan(workload(guided=True), asked, machine(*[float(free)] * gpus), wires)))
        except DoesNotFit:
            assert not ranks
    assert len(ranks) >= 8
    assert ranks == sorted(ranks, reverse=True)


def test_one_gpu_with_more_memory_never_leads_to_a_worse_plan():
    asked = request()
    ranks = [
        rank(plan(workload(), asked, machine(47.0, 47.0, 31.0, free), "host")) for free in (10.0, 31.0, 47.0, 79.0)
    ]
    assert ranks == sorted(ranks, reverse=True)


def test_every_plan_fits_and_so_does_what_it_says_would_fit():
    for free in (15.0, 23.0, 47.0, 79.0):
        for count in (1, 2, 4):
            made = plan(workload(), request(), machine(*[free] * count), "host")
            assert made.estimate is not None and made.size is not None and made.num_frames is not None
            assert made.estimate.total <= free * 2**30
            width, height = made.size
            assert width >= 832 and height >= 480 and made.num_frames >= 81 and made.num_frames % 4 == 1
            plan(workload(width=width, height=height), request(), machine(*[free] * count), "host")
            plan(workload(num_frames=made.num_frames), request(), machine(*[free] * count), "host")
            if made.num_frames < 4097:
                with pytest.raises(DoesNotFit):
                    plan(workload(num_frames=made.num_frames + 4), request(), machine(*[free] * count), "host")
    alone, both = (plan(workload(), request(), machine(23.0, *more), "host") for more in ((), (9.0,)))
    assert (alone.size, alone.num_frames) == (both.size, both.num_frames), "of one of them, if that is more"


def test_what_does_not_fit_is_refused_with_what_would():
    large = {"width": 1280, "height": 720, "num_frames": 321}
    with pytest.raises(DoesNotFit) as error:
        plan(workload(**large), request(), machine(15.0), "host")
    assert str(error.value) == (
        "1280x720 with 321 frames does not fit: it needs about 44.4 GiB on the GPU, where 15.0 GiB are free; "
        "what fits is 688x384 with 321 frames or 1280x720 with 89 frames"
    )
    assert error.value.size == (688, 384)
    plan(workload(**{**large, "width": 688, "height": 384}), request(), machine(15.0), "host")
    plan(workload(**{**large, "num_frames": 89}), request(), machine(15.0), "host")


def test_fewer_frames_do_not_help_where_decoding_one_is_too_much():
    with pytest.raises(DoesNotFit, match=r"what fits is \d+x\d+ with 81 frames$"):
        plan(workload(width=1280, height=720), request(), machine(7.0), "host")


def test_sizes_that_would_fit_are_whole_tokens_of_the_model():
    """TI2V-5B has tokens of 32 pixels."""
    with pytest.raises(DoesNotFit) as error:
        plan(workload("ti2v-5B", experts=1, width=1280, height=704, num_frames=2001), request(), machine(8.0), "host")
    assert error.value.size is not None and all(side % 32 == 0 for side in error.value.size)


def test_weights_alone_may_be_too_much():
    with pytest.raises(DoesNotFit, match="no size fits: the weights alone are too large") as error:
        plan(workload(text_bytes=TEXT), request(), machine(8.0), "host")
    assert error.value.size is None


def test_host_memory_limits_what_waits_there():
    """Streaming on two GPUs, by processes that stay, keeps both experts for each of them: 108 GiB."""
    asked = {"use_fsdp": False, "gpu_count": 2, "keep_warm_seconds": 60.0}
    assert plan(workload(), request(**asked), machine(15.0, 15.0), host_bytes=256 << 30).parallel.stream_blocks
    with pytest.raises(
        DoesNotFit, match="fits is this size with 108 GiB of host memory, of which 58 are left"
    ) as error:
        plan(workload(), request(**asked, offload_model=True), machine(15.0, 15.0), host_bytes=64 << 30)
    assert error.value.size is None, "no smaller one leaves the host more"
    # With the choice it takes one GPU, for which 64 GiB are enough.
    staying = request(use_fsdp=False, keep_warm_seconds=60.0)
    assert plan(workload(), staying, machine(15.0, 15.0), host_bytes=64 << 30).parallel.gpu_count == 1
    # Without the next video in mind each of them needs half.
    going = request(**{**asked, "keep_warm_seconds": 0.0})
    assert plan(workload(), going, machine(15.0, 15.0), host_bytes=64 << 30).parallel.stream_blocks


def test_a_little_more_or_less_memory_does_not_change_the_plan():
    first = plan(workload(), request(), machine(47.01, 47.01), "host")
    second = plan(workload(), request(), machine(47.20, 47.05), "host")
    assert first.parallel == second.parallel


def test_the_block_says_what_and_why():
    block = plan(workload(), request(), machine(23.0), "host", host_bytes=128 << 30).block()
    assert block.splitlines()[0] == "plan: GPU 0; blocks streamed from host memory"
    assert "of 23.0 GiB free (vae 5.6, process " in block
    width, height = map(int, re.search(r"would fit: up to (\d+)x(\d+), or up to \d+ frames", block).groups())
    assert width > height, "as the job's own"
    assert "because stream_blocks is off, but nothing else fits, so it is on for this job" in block
    assert "because everything on each GPU would take " in block
    needed, free = re.search(r"because everything on each GPU would take ([\d.]+) of ([\d.]+) GiB", block).groups()
    # Two experts of 27 GiB each, and what they work on.
    assert float(needed) == pytest.approx(61, abs=3) and free == "23.0"
    two = plan(workload(guided=True), request(**GUIDED), machine(79.0, 79.0, 10.0), "pcie").block()
    assert two.startswith("plan: GPUs 0, 1 (CFG parallel 2); weights whole on each")
    assert "because more than 2 of 3 GPUs would be slower here, or need more memory than they have free" in two
    assert "because the slowest link between these GPUs is pcie" in two


def test_fewer_gpus_than_there_are_need_a_reason_only_where_the_plan_chose_them():
    for asked, gpus, said in ((0, 3, True), (2, 3, False), (0, 2, False), (2, 2, False)):
        made = plan(workload(guided=True), request(asked, **GUIDED), machine(*[79.0, 79.0, 10.0][:gpus]), "pcie")
        assert made.parallel.gpu_count == 2
        assert any(f"more than 2 of {gpus} GPUs" in reason for reason in made.reasons) is said, (asked, gpus)


def test_settings_that_no_number_of_gpus_goes_with():
    with pytest.raises(ValueError, match="no number of GPUs from 3 to 3 goes with cfg_parallel on"):
        plan(workload(), request(3, cfg_parallel="on"), machine(*[79.0] * 3))
    # 40 heads do not divide by 3.
    asked = request(ulysses_engine="deepspeed")
    assert policies(workload(), asked, 4) and not policies(workload(), asked, 3)


def test_many_gpus_are_planned_in_little_time():
    """Not every combination of 64."""
    import time

    start = time.perf_counter()
    made = plan(workload(guided=True), request(**GUIDED), machine(*[79.0] * 64))
    assert made.parallel.gpu_count > 8
    assert time.perf_counter() - start < 20


def test_the_exchange_is_hidden_where_its_buffers_fit():
    """Where they do not, nothing that the user left off is turned on for them."""
    asked = request(2, use_fsdp=False, keep_warm_seconds=60.0)
    alone = Parallel(gpu_count=2, ulysses_engine="packed", keep_warm_seconds=60.0)
    packed = estimate(workload(), alone, 0).total / GIB
    small, large = (plan(workload(), asked, machine(free, free), "host") for free in (packed + 0.3, packed + 2))
    assert small.parallel.ulysses_engine == "packed" and large.parallel.ulysses_engine == "symmetric"
    reason = "the buffers of a symmetric exchange do not fit: it is packed"
    assert reason in small.reasons and reason not in large.reasons
    assert words(small) == words(large) == "0,1 ulysses2 resident"
    for engine in ("packed", "symmetric", "deepspeed"):
        made = plan(workload(), request(2, ulysses_engine=engine), machine(79.0, 79.0), "host")
        assert made.parallel.ulysses_engine == engine and reason not in made.reasons
    # There is nothing to exchange.
    assert plan(workload(), request(1), machine(140.0)).parallel.ulysses_engine == "packed"


def test_of_unequal_gpus_the_ones_with_most_memory_are_named():
    with pytest.raises(DoesNotFit, match=r"on the GPU, where 5\.0 GiB are free"):
        plan(workload(), request(1), machine(3.0, 5.0, 4.0), "host")
    with pytest.raises(DoesNotFit, match=r"on each of 2 GPUs, where 4\.0 GiB are free"):
        plan(workload(), request(2), machine(3.0, 5.0, 4.0), "host")


def test_the_block_says_where_the_weights_are():
    for asked, weights in (
        ({"offload_model": True, "gpu_count": 1}, "weights whole, the idle expert in host memory"),
        ({"offload_model": True, "gpu_count": 2}, "weights whole on each, the idle expert in host memory"),
        ({"memory_optimization": True, "gpu_count": 1}, "weights whole, memory optimization"),
    ):
        assert f"; {weights}\n" in plan(workload(), request(**asked, use_fsdp=False), machine(140.0, 140.0)).block()
    two = plan(workload(), request(2, use_fsdp=True), machine(47.0, 47.0)).block()
    assert "sharded (FSDP), gathered one" in two


def test_one_more_gpu_is_a_little_faster_than_its_rough_figure():
    """Of two plans that take about as long the one with more GPUs runs; not of one that takes a fifth longer."""
    two, three = (as_set(Parallel(gpu_count=count), "") for count in (2, 3))
    fast = rank(dataclasses.replace(two, seconds=100.0))
    assert rank(dataclasses.replace(three, seconds=104.0)) < fast
    assert rank(dataclasses.replace(three, seconds=120.0)) > fast


def test_of_many_gpus_those_with_most_free_memory_are_looked_at():
    free = [79.0, 30.0] * 6
    made = plan(workload(), request(gpu_count=4), machine(*free))
    assert set(made.parallel.gpu_ids) <= {"0", "2", "4", "6", "8", "10"} and "resident" in words(made)
    # Of eight every choice is: two with a fast link between them, though others have a little more free.
    free = [79.5, 79.0, 79.0, 79.5, 79.0, 79.0, 79.0, 79.0]
    made = plan(workload(), request(gpu_count=2), machine(*free), Wires("host", pairs=True))
    assert len({int(gpu) // 2 for gpu in made.parallel.gpu_ids}) == 1


@pytest.mark.parametrize("how", ["auto", "on", "off"])
def test_what_the_user_chose_is_no_reason_of_the_plans(how: str):
    made = plan(workload(guided=True), request(cfg_parallel=how, always_guided=True), machine(*[79.0] * 4))
    assert made.parallel.cfg_parallel is (how != "off")
    assert any("guidance is over 1 at every step" in reason for reason in made.reasons) is (how == "auto")


@pytest.mark.parametrize("tokens", ["few", "many"])
def test_streamed_blocks_take_as_long_as_the_slower_of_copying_and_computing(tokens: str):
    work = workload(num_frames=1 if tokens == "few" else 161, steps=1)
    resident = Parallel(gpu_count=1)
    streamed = dataclasses.replace(resident, stream_blocks=True)
    computing, copying = seconds(work, resident, "nvlink", "nvlink"), work.blocks_bytes / HOST_BYTES
    assert (computing < copying) is (tokens == "few")
    longer = dataclasses.replace(work, steps=2)
    each = seconds(longer, streamed, "nvlink", "nvlink") - seconds(work, streamed, "nvlink", "nvlink")
    assert each == pytest.approx(max(computing, copying))


def test_what_takes_all_that_is_free_fits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "FREE_STEP", 1)
    work, asked = workload(experts=1), request(use_fsdp=False)
    need = estimate(work, Parallel(gpu_count=1)).total
    exact, short = (dataclasses.replace(machine(100.0)[0], free_bytes=size) for size in (need, need - 1))
    assert words(plan(work, asked, [exact])) == "0 ulysses1 resident"
    assert [planning._fits(work, Parallel(gpu_count=1), size, None) for size in (need, need - 1)] == [True, False]
    assert words(plan(work, asked, [short])) != "0 ulysses1 resident"
    monkeypatch.setattr(planning, "HOST_SHARE", 1)
    streamed, waits = request(use_fsdp=False, stream_blocks=True), max(work.experts)
    assert words(plan(work, streamed, machine(100.0), host_bytes=waits)) == "0 ulysses1 stream"
    with pytest.raises(DoesNotFit):
        plan(work, streamed, machine(100.0), host_bytes=waits - 1)


def test_the_slowest_link_counts_and_links_are_in_this_order():
    made = plan(workload(), request(gpu_count=4), machine(*[79.0] * 4), Wires("host", pairs=True))
    assert any("the slowest link between these GPUs is host" in reason for reason in made.reasons)
    assert LINK_BYTES["nvlink"] > LINK_BYTES["pcie"] > LINK_BYTES["host"] >= LINK_BYTES["unknown"] > 0


def test_the_time_of_a_step_is_that_of_its_operations():
    """A forward of A14B at 832x480x81 on one GPU: 783 and 893 TFLOP, as the benchmarks count them."""
    work = workload(experts=1, steps=1)
    took = seconds(work, Parallel(gpu_count=1), "nvlink", "nvlink")
    assert took * COMPUTE / 1e12 == pytest.approx(783 + 893, rel=0.02)
