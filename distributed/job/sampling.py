"""What is sampled, and along which part of the noise schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...wan.sampling.schedule import SOLVERS
from .errors import check


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """What is sampled."""

    width: int
    """Pixels."""
    height: int
    """Pixels."""
    num_frames: int
    """4n + 1."""
    steps: int
    seed: int
    """For `torch.Generator("cpu")`; the same noise for every number of GPUs."""
    solver: str = "unipc"
    shift: float = 12.0
    guidance_low: float = 3.0
    """Guidance while the low-noise expert runs; 1 skips the unconditional pass."""
    guidance_high: float = 4.0
    """Guidance while the high-noise expert runs; 1 skips the unconditional pass."""
    boundary: float = 0.875
    """The high-noise expert runs while the timestep is at least `boundary` * 1000."""
    fps: float = 16.0
    strength: float = 1.0
    """Share of the noise schedule that given latents go through: `steps` steps at its end. 1: all of it."""
    start_step: int = 0
    """First step that runs; given latents are taken to be at its noise level."""
    end_step: int = 0
    """Step before which to stop, leaving the noise in; 0: run to the end."""
    add_noise: bool = True
    """Add the seed's noise to given latents; off for latents that still hold theirs."""

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            value = getattr(self, name)
            check(16 <= value <= 8192, name, value, "16 to 8192")
        check(
            1 <= self.num_frames <= 4097 and self.num_frames % 4 == 1,
            "num_frames",
            self.num_frames,
            f"4n + 1 (the nearest are {self.num_frames // 4 * 4 + 1 if self.num_frames > 0 else 1} "
            f"and {max(self.num_frames, 0) // 4 * 4 + 5})",
        )
        check(1 <= self.steps <= 1000, "steps", self.steps, "1 to 1000")
        check(0 <= self.seed < 2**64, "seed", self.seed, "0 to 2**64 - 1")
        check(self.solver in SOLVERS, "solver", self.solver, "one of " + ", ".join(SOLVERS))
        check(math.isfinite(self.shift) and 0 < self.shift <= 100, "shift", self.shift, "over 0, at most 100")
        for name in ("guidance_low", "guidance_high"):
            value = getattr(self, name)
            check(math.isfinite(value) and 0 <= value <= 100, name, value, "0 to 100")
        check(math.isfinite(self.boundary) and 0 <= self.boundary <= 1, "boundary", self.boundary, "0 to 1")
        check(math.isfinite(self.fps) and 1 <= self.fps <= 240, "fps", self.fps, "1 to 240")
        self._check_range()

    def _check_range(self) -> None:
        check(0.01 <= self.strength <= 1, "strength", self.strength, "0.01 to 1")
        check(0 <= self.start_step < self.steps, "start_step", self.start_step, f"0 to {self.steps - 1} (steps - 1)")
        ok = self.end_step == 0 or self.start_step < self.end_step <= self.steps
        check(
            ok,
            "end_step",
            self.end_step,
            f"0 (to the end) or {self.start_step + 1} to {self.steps} (start_step to steps)",
        )
        if self.strength < 1 and (self.start_step or self.end_step):
            raise ValueError(
                f"strength is {self.strength:g} and the steps are {self.start_step} to {self.end_step or self.steps}; "
                "use one or the other: strength 1, or start_step 0 and end_step 0"
            )

    @property
    def schedule_steps(self) -> int:
        """Steps of the whole noise schedule, of which `step_range` runs."""
        return int(self.steps / self.strength)

    @property
    def step_range(self) -> range:
        """Indices into the whole schedule."""
        if self.strength < 1:
            return range(self.schedule_steps - self.steps, self.schedule_steps)
        return range(self.start_step, self.end_step or self.steps)
