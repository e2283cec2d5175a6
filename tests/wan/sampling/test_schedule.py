"""Grids and solvers against recorded official values and exact solutions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from wan_pack.wan.model.config import HIGH_NOISE, LOW_NOISE
from wan_pack.wan.sampling.denoise import Guidance, denoise, draw_noise
from wan_pack.wan.sampling.schedule import SOLVERS, make_solver


def test_unipc_has_the_official_grid(golden_folder: Path):
    for key, recorded in json.loads((golden_folder / "schedules.json").read_text()).items():
        _, steps, shift = key.split("_")
        solver = make_solver("unipc", int(steps), float(shift))
        assert solver.timesteps == recorded["timesteps"], key
        recorded_sigmas = torch.tensor(recorded["sigmas"])
        torch.testing.assert_close(torch.tensor(solver.sigmas), recorded_sigmas, rtol=0, atol=2e-7)
        # What the library steps along is the same.
        torch.testing.assert_close(solver._scheduler.sigmas, recorded_sigmas, rtol=0, atol=2e-7)
        assert [float(t) for t in solver._scheduler.timesteps] == recorded["timesteps"]


def test_lightning_has_its_grid():
    assert make_solver("euler", 4, 5.0).timesteps == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-3)
    eight = [1000, 972.22, 937.5, 892.857, 833.33, 750, 625, 416.67]
    assert make_solver("euler", 8, 5.0).timesteps == pytest.approx(eight, abs=1e-2)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_solvers_follow_a_straight_line_exactly(name: str, steps: int):
    """With one noise and one video the velocity is constant, and every solver must arrive at the video."""
    solver = make_solver(name, steps, 5.0)
    noise, video = torch.randn(2, 6, 4).unbind(0)
    sigma = 0.999 * 5 / (1 + 4 * 0.999) if name == "unipc" else 1.0
    sample = (1 - sigma) * video + sigma * noise
    for index in range(steps):
        sample = solver.step(noise - video, index, sample)
    torch.testing.assert_close(sample, video, rtol=1e-4, atol=1e-4)


def test_a_solver_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"'ddim'.*unipc"):
        make_solver("ddim", 4, 5.0)


def test_noise_is_the_same_bits_for_a_seed():
    assert torch.equal(draw_noise((16, 3, 4, 6), 7), draw_noise((16, 3, 4, 6), 7))
    assert not torch.equal(draw_noise((16, 3, 4, 6), 7), draw_noise((16, 3, 4, 6), 8))
    assert draw_noise((16, 1, 2, 2), 2**64 - 1).isfinite().all()
    # As the documentation says: the CPU's generator reads the lower half.
    assert torch.equal(draw_noise((16, 3, 4, 6), 7), draw_noise((16, 3, 4, 6), 7 + 2**32))


def test_noise_is_drawn_in_float32_on_the_cpu():
    """As the official code draws it; in another dtype or on a GPU the generator gives other numbers."""
    drawn = draw_noise((16, 3, 4, 6), 7)
    expected = torch.randn(16, 3, 4, 6, generator=torch.Generator("cpu").manual_seed(7), dtype=torch.float32)
    assert drawn.dtype == torch.float32 and torch.equal(drawn, expected)


def test_a_model_of_one_expert_runs_it_at_every_step():
    for only, scale in ((HIGH_NOISE, 4.0), (LOW_NOISE, 3.0)):
        guidance = Guidance(low=3.0, high=4.0, boundary=0.875, only=only)
        assert {guidance.expert(t) for t in (0.0, 500.0, 1000.0)} == {only}
        assert guidance.scale(only) == scale


def run_loop(guidance: Guidance) -> list[tuple[str, bool]]:
    asked: list[tuple[str, bool]] = []

    def predict(expert: str, tokens: torch.Tensor, timestep: float, passes: tuple[bool, ...]) -> list[torch.Tensor]:
        asked.extend((expert, conditional) for conditional in passes)
        return [tokens * (0.5 if conditional else 0.25) for conditional in passes]

    denoise(torch.ones(2, 4), solver=make_solver("euler", 4, 5.0), guidance=guidance, predict=predict)
    return asked


def test_guidance_of_one_skips_the_unconditional_pass():
    asked = run_loop(Guidance(low=1.0, high=1.0, boundary=0.875))
    assert asked == [(HIGH_NOISE, True)] * 2 + [(LOW_NOISE, True)] * 2


def test_guidance_is_per_expert():
    asked = run_loop(Guidance(low=1.0, high=4.0, boundary=0.875))
    assert asked == [(HIGH_NOISE, True), (HIGH_NOISE, False)] * 2 + [(LOW_NOISE, True)] * 2


def test_boundary_includes_its_timestep():
    guidance = Guidance(low=1, high=1, boundary=0.9375)
    assert guidance.expert(937.5) == HIGH_NOISE
    assert guidance.expert(937.4) == LOW_NOISE
