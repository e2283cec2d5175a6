"""Which steps of the noise schedule run, and from which seed."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from jobs import stub_job
from wan_pack.distributed.job.job import Job, Sampling


def sampling(**settings: Any) -> Sampling:
    return Sampling(**{"width": 64, "height": 48, "num_frames": 5, "steps": 20, "seed": 1, **settings})


@pytest.mark.parametrize(
    ("steps", "strength", "whole"),
    [
        # As the samplers of images do it: int(steps / strength), never rounded up.
        (20, 0.6, 33),
        (4, 0.6, 6),
        (8, 0.3, 26),
        (20, 0.5, 40),
        (1, 0.99, 1),
        (3, 0.01, 300),
        (20, 1.0, 20),
    ],
)
def test_a_strength_runs_the_end_of_a_longer_schedule(steps: int, strength: float, whole: int):
    chosen = sampling(steps=steps, strength=strength)
    assert chosen.schedule_steps == whole
    assert chosen.step_range == range(whole - steps, whole)


@pytest.mark.parametrize(
    ("start", "end", "steps"), [(0, 0, range(20)), (5, 0, range(5, 20)), (0, 5, range(5)), (5, 20, range(5, 20))]
)
def test_steps_that_are_asked_for(start: int, end: int, steps: range):
    chosen = sampling(start_step=start, end_step=end)
    assert (chosen.schedule_steps, chosen.step_range) == (20, steps)


@pytest.mark.parametrize("changes", [{"start_step": 1}, {"end_step": 3}])
def test_a_strength_and_steps_are_one_too_many(changes: dict[str, int]):
    with pytest.raises(ValueError, match=r"strength is 0\.5 and the steps are .*use one or the other"):
        sampling(strength=0.5, **changes)
    sampling(strength=1.0, **changes)


def test_equal_start_and_end_are_no_step():
    with pytest.raises(ValueError, match=r"end_step is 5; .* 6 to 20"):
        sampling(start_step=5, end_step=5)
    assert list(sampling(start_step=5, end_step=6).step_range) == [5]


EDGES = {
    "width": (16, 8192), "height": (16, 8192), "num_frames": (1, 4097), "steps": (1, 1000), "seed": (0, 2**64 - 1),
    "shift": (1e-9, 100.0), "guidance_low": (0.0, 100.0), "guidance_high": (0.0, 100.0), "boundary": (0.0, 1.0),
    "fps": (1.0, 240.0), "strength": (0.01, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("field", EDGES)
def test_every_bound_is_allowed_and_the_next_value_is_not(field: str):
    low, high = EDGES[field]
    step = 4 if field == "num_frames" else 1 if isinstance(low, int) else 1e-3
    for value in (low, high):
        assert getattr(sampling(**{field: value}), field) == value
    for value in (low - step, high + step):
        with pytest.raises(ValueError, match=field):
            sampling(**{field: value})


def test_the_seed_of_a_job_is_kept_whole():
    """Beyond 32 and beyond 53 bits, in which JSON elsewhere counts."""
    for seed in (2**32 + 5, 2**53 + 1, 2**64 - 1):
        job = dataclasses.replace(stub_job(), sampling=sampling(seed=seed))
        assert Job.from_json(job.to_json()).sampling.seed == json.loads(job.to_json())["sampling"]["seed"] == seed
