"""Sigma grids and solvers of flow matching, as the official Wan2.2 code runs them.

Noise level sigma goes from 1 (noise) to 0 (video); the model is told `1000 * sigma`. A solver owns its timesteps and
the history of a multistep method; one solver spans both experts, so its history crosses the switch.
Every update is elementwise: a rank may hold any part of the sequence. Loads without torch: the names of `SOLVERS` are
those of a job's `solver` and of the node's choices.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


def shifted(sigma: float, shift: float) -> float:
    """Moves a noise level towards noise: shift * s / (1 + (shift - 1) * s)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


class Solver(ABC):
    """Integrates the flow over `steps` steps.

    Making one costs nothing: the library behind it is imported at the first step.

    Args:
        first: the step to begin with.
    """

    sigmas: Sequence[float]
    """Noise level before each step, and after the last."""
    timesteps: Sequence[float]
    """What the model is told at each step, 0 to 1000."""

    def __init__(self, steps: int, shift: float, first: int = 0) -> None:
        self.sigmas = [shifted(float(sigma), shift) for sigma in self._grid(steps)]
        self.timesteps = [self._timestep(NUM_TRAIN_TIMESTEPS * sigma) for sigma in self.sigmas[:-1]]
        self._first = first

    @staticmethod
    def _grid(steps: int) -> np.ndarray:
        """Noise levels before the shift, [steps + 1]."""
        import numpy as np

        return np.linspace(1, 0, steps + 1)

    @staticmethod
    def _timestep(value: float) -> float:
        return float(int(value))

    @abstractmethod
    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        """One update.

        Args:
            velocity: the model's output for `sample` at `timesteps[index]`, float32.
            index: `first`, `first` + 1, ... in order.
            sample: [..., channels], float32.
        Returns:
            the sample at the next noise level.
        """


class LibrarySolver(Solver):
    """A solver whose updates are a diffusers scheduler's, on this module's grid: no scheduler's own is the official."""

    @abstractmethod
    def _make_scheduler(self) -> Any: ...

    @cached_property
    def _scheduler(self) -> Any:
        import numpy as np

        scheduler = self._make_scheduler()
        scheduler.set_timesteps(sigmas=np.array(self.sigmas[:-1]))
        scheduler.set_begin_index(self._first)
        return scheduler

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        scheduler = self._scheduler
        return scheduler.step(velocity, scheduler.timesteps[index], sample, return_dict=False)[0]


class UniPC(LibrarySolver):
    """UniPC, order 2, bh2 (Zhao et al., 2023, arXiv 2302.04867). The official grid starts at 0.999, not at 1."""

    @staticmethod
    def _grid(steps: int) -> np.ndarray:
        import numpy as np

        return np.linspace(np.float32(1 - 1 / NUM_TRAIN_TIMESTEPS), 0, steps + 1)

    def _make_scheduler(self) -> Any:
        from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

        # The sigmas that it is given are shifted already.
        return UniPCMultistepScheduler(
            num_train_timesteps=NUM_TRAIN_TIMESTEPS,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=1.0,
        )


class DPMSolverPlusPlus(Solver):
    """DPM-Solver++(2M), midpoint (Lu et al., 2022, arXiv 2211.01095), on the official grid.

    Written out because diffusers' scheduler cannot take this grid: it starts at exactly 1, where log-SNR is minus
    infinity. There the second-order term vanishes, so the first two steps and the last one are of order 1.
    """

    # Of the step before; without one, wherever that is, the update is of order 1.
    _previous: Tensor | None = None

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        sigma, sigma_next = self.sigmas[index : index + 2]
        denoised = sample - sigma * velocity
        estimate = denoised
        if self._previous is not None and sigma_next > 0:
            h = _log_snr(sigma_next) - _log_snr(sigma)
            h_previous = _log_snr(sigma) - _log_snr(self.sigmas[index - 1])
            estimate = denoised + (denoised - self._previous) * (0.5 * h / h_previous)
        self._previous = denoised
        # exp(-h) * alpha_next / alpha = sigma_next / sigma, so alpha_next * (1 - exp(-h)) is this:
        ratio = sigma_next / sigma
        return ratio * sample + ((1 - sigma_next) - ratio * (1 - sigma)) * estimate


def _log_snr(sigma: float) -> float:
    """Of a level over 0."""
    return -math.inf if sigma >= 1 else math.log1p(-sigma) - math.log(sigma)


class Euler(LibrarySolver):
    """Euler's method on the grid that Wan2.2-Lightning was distilled for: from exactly 1, with exact timesteps."""

    @staticmethod
    def _timestep(value: float) -> float:
        return value

    def _make_scheduler(self) -> Any:
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS, shift=1.0)


SOLVERS: dict[str, type[Solver]] = {"unipc": UniPC, "dpm++": DPMSolverPlusPlus, "euler": Euler}


def make_solver(name: str, steps: int, shift: float, first: int = 0) -> Solver:
    """A fresh solver whose first update is that of step `first`. Raises ValueError on an unknown name."""
    if name not in SOLVERS:
        raise ValueError(f"solver is {name!r}; it must be one of {', '.join(SOLVERS)}")
    return SOLVERS[name](steps, shift, first)
