"""The sampling loop: two experts, classifier-free guidance, one solver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.config import HIGH_NOISE, LOW_NOISE
from .schedule import NUM_TRAIN_TIMESTEPS, Solver

Predict = Callable[[str, Tensor, float, tuple[bool, ...]], Sequence[Tensor]]
"""(expert, tokens, timestep, for each pass: conditional?) -> for each pass: velocity of `tokens`.

Both passes of a guided step are asked for at once, so that they may run at the same time.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """Which expert runs, and how strongly it is guided."""

    low: float
    high: float
    boundary: float
    """The high-noise expert runs while t >= boundary * 1000."""
    only: str | None = None
    """The expert that runs every step, of a model that has one."""

    def expert(self, timestep: float) -> str:
        if self.only is not None:
            return self.only
        return HIGH_NOISE if timestep >= self.boundary * NUM_TRAIN_TIMESTEPS else LOW_NOISE

    def scale(self, expert: str) -> float:
        return self.high if expert == HIGH_NOISE else self.low


def draw_noise(shape: tuple[int, int, int, int], seed: int) -> Tensor:
    """The starting latents [C, T, H, W], float32: the same bits on every rank, for any number of ranks."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


def noised(samples: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Latents at noise level `sigma`: the straight line from video (0) to noise (1)."""
    return (1 - sigma) * samples + sigma * noise


@dataclass(frozen=True, slots=True)
class Known:
    """Latents that are given and must stay, such as the first frame of a TI2V model."""

    tokens: Tensor
    """[S, channels], float32."""
    mask: Tensor
    """[S, channels], bool: True where `tokens` stays."""

    def impose(self, tokens: Tensor) -> Tensor:
        return torch.where(self.mask, self.tokens, tokens)

    @property
    def which_timestep(self) -> Tensor:
        """[S], int64: 0 for tokens that are known (timestep 0), 1 for the others; a token's first corner decides."""
        return 1 - self.mask[:, 0].long()


def denoise(
    tokens: Tensor,
    *,
    solver: Solver,
    guidance: Guidance,
    predict: Predict,
    steps: range | None = None,
    known: Known | None = None,
    on_step: Callable[[int], None] = lambda index: None,
    on_estimate: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Runs the loop.

    Args:
        tokens: [S, channels], float32, at the noise level of the first step; any part of the sequence.
        predict: the evaluations of one expert. With a guidance of 1 it is not asked for the unconditional velocity.
        steps: which steps run; all of them by default.
        known: put back before the first and after every step, as the official code does.
        on_step: called after each step with how many have run.
        on_estimate: called before `on_step` with how many have run and the denoised tokens that the step expects.
    Returns:
        the denoised tokens, same shape.
    """
    steps = range(len(solver.timesteps)) if steps is None else steps
    if known is not None:
        tokens = known.impose(tokens)
    for done, index in enumerate(steps, start=1):
        timestep = solver.timesteps[index]
        expert = guidance.expert(timestep)
        scale = guidance.scale(expert)
        if scale == 1:
            (velocity,) = predict(expert, tokens, timestep, (True,))
        else:
            conditional, unconditional = predict(expert, tokens, timestep, (True, False))
            velocity = unconditional + scale * (conditional - unconditional)
        before = tokens
        tokens = solver.step(velocity, index, before)
        if known is not None:
            tokens = known.impose(tokens)
        if on_estimate is not None:
            estimate = before - solver.sigmas[index] * velocity
            on_estimate(done, estimate if known is None else known.impose(estimate))
        on_step(done)
    return tokens
