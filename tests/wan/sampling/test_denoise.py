"""The sampling loop: what the model is asked, what becomes of its answers, and who is told when."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from wan_pack.wan.model.config import HIGH_NOISE, LOW_NOISE
from wan_pack.wan.sampling.denoise import Guidance, Known, denoise
from wan_pack.wan.sampling.schedule import make_solver

EULER = make_solver("euler", 2, 1.0)
"""Of noise levels 1, 0.5 and 0."""


def test_guidance_goes_from_the_unconditional_velocity_through_the_conditional_one():
    """By hand: 2 + 4 * (3 - 2) = 6 with the first expert, 2 + 3 * (3 - 2) = 5 with the second, half a step each."""
    asked = []

    def predict(expert: str, tokens: Tensor, timestep: float, passes: tuple[bool, ...]) -> list[Tensor]:
        asked.append((expert, timestep, passes))
        return [torch.full((1, 4), 3.0 if conditional else 2.0) for conditional in passes]

    start = torch.full((1, 4), 10.0)
    out = denoise(start, solver=EULER, guidance=Guidance(low=3.0, high=4.0, boundary=0.75), predict=predict)
    torch.testing.assert_close(out, torch.full((1, 4), 10.0 - 6 / 2 - 5 / 2))
    assert asked == [(HIGH_NOISE, 1000.0, (True, False)), (LOW_NOISE, 500.0, (True, False))]


@pytest.mark.parametrize(("steps", "levels"), [(None, [1.0, 0.5]), (range(1, 2), [0.5])])
def test_each_step_is_told_with_what_it_expects_before_it_counts_as_done(steps: range | None, levels: list[float]):
    told: list[object] = []
    out = denoise(
        torch.full((1, 4), 8.0), solver=make_solver("euler", 2, 1.0, 0 if steps is None else 1), steps=steps,
        guidance=Guidance(low=1.0, high=1.0, boundary=0.5), predict=lambda *_: [torch.full((1, 4), 2.0)],
        on_step=told.append, on_estimate=lambda done, estimate: told.append((done, estimate[0, 0].item())),
    )  # fmt: skip
    # From a level the whole way to 0 with this velocity.
    expected, at = [], 8.0
    for done, level in enumerate(levels, start=1):
        expected += [(done, pytest.approx(at - level * 2.0)), done]
        at -= 0.5 * 2.0
    assert told == expected and out[0, 0].item() == pytest.approx(at)


def test_what_is_known_is_there_at_every_evaluation():
    known = Known(torch.full((3, 4), 7.0), torch.tensor([[True] * 4, [False] * 4, [False, True, True, True]]))
    seen: list[Tensor] = []

    def predict(expert: str, tokens: Tensor, timestep: float, passes: tuple[bool, ...]) -> list[Tensor]:
        seen.append(tokens)
        return [torch.ones(3, 4)]

    start = torch.zeros(3, 4)
    out = denoise(
        start, solver=make_solver("euler", 3, 1.0), guidance=Guidance(low=1.0, high=1.0, boundary=0.5), known=known,
        predict=predict,
    )  # fmt: skip
    assert len(seen) == 3
    for tokens in (*seen, out):
        assert (tokens[known.mask] == 7).all() and (tokens[~known.mask] != 7).all()
    # The first corner of a token says at which timestep it is.
    assert known.which_timestep.tolist() == [0, 1, 1] and known.which_timestep.dtype == torch.int64


def test_a_solver_of_order_2_comes_four_times_closer_with_twice_the_steps():
    """From noise level 1/2 to 1/4, of values that are normal with a deviation of 0.5: the best velocity and its way are
    known exactly."""

    def variance(level: float) -> float:
        return (1 - level) ** 2 / 4 + level**2

    def error(name: str, steps: int) -> float:
        solver, sample = make_solver(name, steps, 1.0, steps // 2), torch.ones(1, 1, dtype=torch.float64)
        for index in range(steps // 2, steps * 3 // 4):
            level = solver.sigmas[index]
            sample = solver.step((level - (1 - level) / 4) / variance(level) * sample, index, sample)
        return abs(sample.item() - (variance(0.25) / variance(0.5)) ** 0.5)

    assert 3.5 < error("dpm++", 80) / error("dpm++", 160) < 4.5
    assert 1.8 < error("euler", 80) / error("euler", 160) < 2.2
    assert error("dpm++", 160) < 0.1 * error("euler", 160)
