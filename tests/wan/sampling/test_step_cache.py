"""Which steps take their velocity from an earlier one, and which velocity that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from wan_pack.wan.model.config import HIGH_NOISE, LOW_NOISE
from wan_pack.wan.sampling.step_cache import StepCache


class Model:
    """Velocities that follow their input slowly: one for each pass."""

    def __init__(self) -> None:
        self.asked: list[float] = []

    def __call__(self, expert: str, tokens: Tensor, timestep: float, passes: tuple[bool, ...]) -> Sequence[Tensor]:
        self.asked.append(timestep)
        sign = 1 if expert == HIGH_NOISE else -1
        return [sign * (1 + 0.1 * tokens * (1 if conditional else 2)) for conditional in passes]


def mean(tensor: Tensor) -> float:
    return tensor.abs().mean().item()


def run(threshold: float, steps: range, schedule_steps: int, *, experts: str = "", passes: Sequence[bool] = (True,)):
    """Tokens that go from 0 by 0.1 a step -> (indices asked, indices reused, velocities)."""
    model = Model()
    cache = StepCache(model, threshold=threshold, steps=steps, schedule_steps=schedule_steps, mean=mean)
    velocities = []
    for index in steps:
        expert = LOW_NOISE if experts[index - steps.start : index - steps.start + 1] == "l" else HIGH_NOISE
        velocities.append(cache(expert, torch.full((2, 3), 0.1 * index), float(index), tuple(passes)))
    return [int(t) for t in model.asked], cache.reused, velocities


def test_by_hand():
    """Of 20 steps, the cache looks at 3 to 18. The velocity 1 + x / 10 moves a tenth of what x does, which two of them
    show. From then on 0.01 more for each 0.1 since the last evaluation, divided by about 1: 0.01 + 0.02 + 0.03 is the
    last sum below 0.07."""
    asked, reused, velocities = run(0.07, range(20), 20)
    assert reused[:6] == [5, 6, 7, 9, 10, 11]
    assert asked == [index for index in range(20) if index not in reused]
    # Step 4: 1.04 at 0.4, that is 0.64 more than its input.
    torch.testing.assert_close(velocities[5][0], torch.full((2, 3), 0.5 + 0.64))


def test_the_beginning_and_the_end_are_asked_for():
    _, reused, _ = run(1e9, range(100), 100)
    assert reused == list(range(17, 95))
    assert run(1e9, range(40, 100), 100)[1] == list(range(42, 95)), "a part of a schedule: its own place in it"
    assert run(1e9, range(4), 4)[1] == [3]


def test_experts_know_nothing_of_each_other():
    _, reused, velocities = run(1e9, range(40), 40, experts="h" * 20 + "l" * 20)
    assert reused == [*range(8, 20), *range(22, 38)]
    assert velocities[20][0][0, 0] == pytest.approx(-(1 + 0.1 * 2.0))


def test_every_pass_has_its_own_difference():
    _, reused, velocities = run(1e9, range(20), 20, passes=(True, False))
    assert reused[0] == 5
    conditional, unconditional = velocities[5]
    torch.testing.assert_close(conditional, torch.full((2, 3), 0.5 + 0.64))
    torch.testing.assert_close(unconditional, torch.full((2, 3), 0.5 + 0.68))


def test_latents_that_stand_still_are_no_division_by_zero():
    model = Model()
    cache = StepCache(model, threshold=0.2, steps=range(10), schedule_steps=10, mean=mean)
    for index in range(10):
        cache(HIGH_NOISE, torch.ones(2, 3), float(index), (True,))
    assert cache.reused == []


def reused_by(answer: Callable[[Tensor], Tensor], threshold: float) -> list[int]:
    """Steps 0 to 19 of 20, with tokens that go up by 1 a step."""
    cache = StepCache(
        lambda expert, tokens, timestep, passes: [answer(tokens)], threshold=threshold, steps=range(20),
        schedule_steps=20, mean=mean,
    )  # fmt: skip
    for index in range(20):
        cache(HIGH_NOISE, torch.full((2, 3), float(index)), float(index), (True,))
    return cache.reused


def test_what_moves_as_much_as_the_threshold_is_asked_for():
    """Half of what the input moves: 0.5 of an output of 2 at step 4, that is 0.25, exactly."""
    assert reused_by(lambda tokens: tokens / 2, 0.25)[0] == 6
    assert reused_by(lambda tokens: tokens / 2, 0.26)[0] == 5


def test_a_model_that_says_nothing_is_no_division_by_zero():
    assert reused_by(torch.zeros_like, 1e9) == []


def test_an_expert_begins_as_if_no_other_had_been():
    """With nothing of what the other's tokens had moved since it was asked."""
    joint = run(0.07, range(20), 20, experts="h" * 7 + "l" * 13)[1]
    alone = run(0.07, range(7, 20), 20, experts="l" * 13)[1]
    assert joint == [5, 6, *alone] and alone[0] == 9
