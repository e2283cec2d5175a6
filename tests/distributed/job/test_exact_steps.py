"""Which steps round nothing to 8 bits, by their timesteps, and how blocks are named."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from jobs import stub_job
from wan_pack.distributed.job.job import ForwardsJob, GroupJob, JobError, Parallel
from wan_pack.distributed.job.sampling import (
    EVERYWHERE,
    NOWHERE,
    RoundedTimesteps,
    rounded_of_sigmas,
    rounded_steps,
    rounded_timesteps,
)
from wan_pack.distributed.job.setting import numbers_in, text_of
from wan_pack.wan.sampling.schedule import SOLVERS, make_solver


@pytest.mark.parametrize(
    ("text", "numbers", "shortest"),
    [
        ("", (), ""), ("  ", (), ""), ("7", (7,), "7"), ("39,0-2", (0, 1, 2, 39), "0-2, 39"),
        (" 3 - 5 , 4, 6", (3, 4, 5, 6), "3-6"), ("0, 1", (0, 1), "0-1"), ("999", (999,), "999"), ("4-4", (4,), "4"),
    ],
)  # fmt: skip
def test_blocks_are_numbers_and_ranges(text: str, numbers: tuple[int, ...], shortest: str):
    assert numbers_in(Parallel(gpu_count=1, exact_blocks=text).exact_blocks) == numbers
    assert text_of(numbers) == shortest and numbers_in(shortest) == numbers


@pytest.mark.parametrize(
    "text", ["a", "1-", "-1", "2-1", "1,,2", ",", "1;2", "1000", "0-1000", "9" * 40, "1.5", "１", "0," * 1001]
)
def test_other_texts_are_refused(text: str):
    with pytest.raises(ValueError, match=r"exact_blocks is .* such as 0-2, 39, all below 1000"):
        Parallel(gpu_count=1, exact_blocks=text)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("exact", [0, 1, 3, 10])
def test_the_first_and_the_last_steps_are_exact(solver: str, steps: int, exact: int):
    timesteps = make_solver(solver, steps, 5.0).timesteps
    rounded = rounded_timesteps(timesteps, exact)
    found = [index for index, timestep in enumerate(timesteps) if rounded.holds(timestep)]
    assert found == list(range(exact, steps - exact))
    assert rounded_steps(range(steps), steps, exact) == len(found)
    # A part of the schedule has those that are its own.
    for part in (range(steps // 4, steps), range(steps // 2), range(steps // 4, steps // 2 + 1)):
        assert rounded_steps(part, steps, exact) == len([index for index in part if index in found])


def test_a_sampler_elsewhere_may_evaluate_within_a_step():
    sigmas = [1.0, 0.9, 0.7, 0.4, 0.1, 0.0]
    rounded = rounded_of_sigmas(sigmas, 1)
    assert [rounded.holds(t) for t in (1000.0, 960.0, 900.0, 640.0, 300.0, 100.0, 20.0)] == [
        False, False, True, True, True, False, False
    ]  # fmt: skip
    # As float32 numbers come from ComfyUI.
    assert rounded.holds(899.99994) and not rounded.holds(100.00001)


@pytest.mark.parametrize(
    ("sigmas", "exact", "expected"),
    [
        ([1.0, 0.9, 0.7, 0.4, 0.1, 0.0], 0, EVERYWHERE),
        # The first and the second part of a schedule, its middle, and latents that are only partly noise.
        ([1.0, 0.9, 0.7], 1, RoundedTimesteps(below=950.0)),
        ([0.7, 0.4, 0.1, 0.0], 1, RoundedTimesteps(above=250.0)),
        ([0.9, 0.7, 0.4], 1, EVERYWHERE),
        ([0.99, 0.0], 1, NOWHERE),
        ([1.0, 0.5, 0.0], 1, NOWHERE),
        ([], 1, EVERYWHERE),
        # Of a schedule for another kind of model.
        ([14.6, 2.0, 0.0], 0, EVERYWHERE),
    ],
)
def test_the_ends_of_a_part_of_a_schedule(sigmas: list[float], exact: int, expected: RoundedTimesteps):
    found = rounded_of_sigmas(sigmas, exact)
    assert (found.above, found.below) == pytest.approx((expected.above, expected.below))


def test_the_edges_themselves_are_exact():
    between = RoundedTimesteps(above=100.0, below=900.0)
    assert [between.holds(t) for t in (100.0, 100.5, 899.5, 900.0)] == [False, True, True, False]
    assert EVERYWHERE.holds(0.0) and EVERYWHERE.holds(1000.0) and not NOWHERE.holds(1000.0)


def test_a_job_carries_them():
    file = stub_job(gpu_count=1).model.transformer
    job = ForwardsJob(id="ab", parallel=Parallel(gpu_count=1), model=file, rounded=RoundedTimesteps(above=5.0))
    assert GroupJob.from_json(job.to_json()) == job
    for value, shown in (("-5.0", r"-5\.0"), ("1000001.0", r"1000001\.0"), ("NaN", "nan"), ("Infinity", "inf")):
        with pytest.raises(JobError, match=rf"above is {shown}; it must be -1 to 1,000,000"):
            GroupJob.from_json(job.to_json().replace("5.0", value))


@pytest.mark.parametrize(
    ("settings", "rounds"),
    [
        ({}, False), ({"attention": "fa3"}, False), ({"attention": "sol"}, False), ({"attention": "fa3-fp8"}, True),
        ({"attention": "sage"}, True), ({"linear_precision": "fp8"}, True), ({"linear_precision": "int8"}, True),
    ],
)  # fmt: skip
def test_what_rounds(settings: dict[str, Any], rounds: bool):
    assert dataclasses.replace(Parallel(gpu_count=1), **settings).rounds is rounds
