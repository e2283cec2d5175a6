"""What is sampled, and along which part of the noise schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...wan.model.latent_space import WAN21
from ...wan.sampling.schedule import SOLVERS
from ...wan.video.video_formats import CRF, FORMATS, H264, MAX_CRF, VideoFormat
from .errors import check
from .setting import check_settings, choice, number

MAX_SEED = 2**64 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSettings:
    """What a user decides of the sampling, each value by itself."""

    width: int = number(832, 16, 8192, step=WAN21.pixel_multiple, required=True)
    """Pixels."""
    height: int = number(480, 16, 8192, step=WAN21.pixel_multiple, required=True)
    """Pixels."""
    num_frames: int = number(81, 1, 4097, step=4, required=True)
    """4n + 1."""
    steps: int = number(20, 1, 1000, required=True)
    seed: int = number(0, 0, MAX_SEED, words="0 to 2**64 - 1", required=True)
    """For `torch.Generator("cpu")`; the same noise for every number of GPUs."""
    solver: str = choice("unipc", SOLVERS)
    shift: float = number(12.0, 0.0, 100.0, step=0.01, open=True)
    guidance_low: float = number(3.0, 0.0, 100.0, step=0.01)
    """Guidance while the low-noise expert runs; 1 skips the unconditional pass."""
    guidance_high: float = number(4.0, 0.0, 100.0, step=0.01)
    """Guidance while the high-noise expert runs; 1 skips the unconditional pass."""
    boundary: float = number(0.875, 0.0, 1.0, step=0.001)
    """The high-noise expert runs while the timestep is at least `boundary` * 1000."""
    fps: float = number(16.0, 1.0, 240.0, step=1.0)
    strength: float = number(1.0, 0.01, 1.0, step=0.01)
    """Share of the noise schedule that given latents go through: `steps` steps at its end. 1: all of it."""
    start_step: int = number(0, 0, 999)
    """First step that runs; given latents are taken to be at its noise level."""
    end_step: int = number(0, 0, 1000)
    """Step before which to stop, leaving the noise in; 0: run to the end."""
    add_noise: bool = True
    """Add the seed's noise to given latents; off for latents that still hold theirs."""
    reuse_threshold: float = number(0.0, 0.0, 3.0, step=0.01)
    """Of `wan.sampling.step_cache`; 0 asks the model at every step."""
    crf: int = number(CRF, 0, MAX_CRF)
    """Of a video file whose format takes one: lower is better, and larger."""
    video_format: str = choice(H264, FORMATS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling(SamplingSettings):
    """What is sampled."""

    def __post_init__(self) -> None:
        frames = self.num_frames
        below = max((frames - 1) // 4 * 4 + 1, 1)
        check(
            frames > 0 and frames % 4 == 1,
            "num_frames", frames, f"4n + 1 (the nearest are {below} and {below + 4})",
        )  # fmt: skip
        check_settings(self, but=("start_step", "end_step"))
        self._check_range()

    def _check_range(self) -> None:
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
    def file_format(self) -> VideoFormat:
        """Of the video's file."""
        return FORMATS[self.video_format]

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


@dataclass(frozen=True, slots=True)
class RoundedTimesteps:
    """Between which timesteps, neither included, values may be rounded to 8 bits. By default everywhere."""

    above: float = -1.0
    below: float = 1e6

    def __post_init__(self) -> None:
        for name in ("above", "below"):
            value = getattr(self, name)
            check(-1.0 <= value <= 1e6, name, value, "-1 to 1,000,000")

    def holds(self, timestep: float) -> bool:
        return self.above < timestep < self.below


EVERYWHERE, NOWHERE = RoundedTimesteps(), RoundedTimesteps(above=1e6, below=-1.0)
BEGINNING = 0.9999
"""Sigmas above this one are a schedule's first."""


def rounded_timesteps(
    timesteps: Sequence[float], exact_steps: int, *, begins: bool = True, ends: bool = True
) -> RoundedTimesteps:
    """All but the first and the last so many steps. Their edges lie half-way between two steps, so that a solver may
    evaluate within one.

    Args:
        timesteps: at which the steps begin, descending.
        begins, ends: the first or the last of them is a schedule's; there are no exact ones at the other end.
    """
    first, last, count = exact_steps * begins, exact_steps * ends, len(timesteps)
    if first + last >= count:
        return NOWHERE if first + last else EVERYWHERE

    def before(index: int) -> float:
        return (timesteps[index - 1] + timesteps[index]) / 2

    return RoundedTimesteps(
        above=before(count - last) if last else EVERYWHERE.above, below=before(first) if first else EVERYWHERE.below
    )


def rounded_of_sigmas(sigmas: Sequence[float], exact_steps: int) -> RoundedTimesteps:
    """As `rounded_timesteps`, of a sampler that is given a schedule's noise levels [steps + 1], or some that follow one
    another: which they are is seen from their ends."""
    return rounded_timesteps(
        [1000 * sigma for sigma in sigmas[:-1]], exact_steps,
        begins=len(sigmas) > 0 and sigmas[0] > BEGINNING, ends=len(sigmas) > 0 and sigmas[-1] == 0,
    )  # fmt: skip


def rounded_steps(steps: range, of: int, exact_steps: int) -> int:
    """How many of `steps`, in a schedule of `of`, `rounded_timesteps` leaves."""
    return len(range(max(steps.start, exact_steps), min(steps.stop, of - exact_steps)))
