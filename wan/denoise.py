"""The sampling loop: two experts, classifier-free guidance, one solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .schedule import NUM_TRAIN_TIMESTEPS, Solver

HIGH_NOISE, LOW_NOISE = "high_noise", "low_noise"

Predict = Callable[[str, Tensor, float, bool], Tensor]
"""(expert, tokens, timestep, conditional) -> velocity of `tokens`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """Which expert runs, and how strongly it is guided."""

    low: float
    high: float
    boundary: float
    """The high-noise expert runs while t >= boundary * 1000."""

    def expert(self, timestep: float) -> str:
        return HIGH_NOISE if timestep >= self.boundary * NUM_TRAIN_TIMESTEPS else LOW_NOISE

    def scale(self, expert: str) -> float:
        return self.high if expert == HIGH_NOISE else self.low


def draw_noise(shape: tuple[int, int, int, int], seed: int) -> Tensor:
    """The starting latents [C, T, H, W], float32: the same bits on every rank, for any number of ranks."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


def denoise(
    tokens: Tensor,
    *,
    solver: Solver,
    guidance: Guidance,
    predict: Predict,
    on_step: Callable[[int], None] = lambda index: None,
) -> Tensor:
    """Runs the loop.

    Args:
        tokens: [S, channels], float32 noise; any part of the sequence.
        predict: one evaluation of one expert. With a guidance of 1 it is not asked for the unconditional velocity.
        on_step: called after each step with its index.
    Returns:
        the denoised tokens, same shape.
    """
    for index, timestep in enumerate(solver.timesteps):
        expert = guidance.expert(timestep)
        scale = guidance.scale(expert)
        velocity = predict(expert, tokens, timestep, True)
        if scale != 1:
            unconditional = predict(expert, tokens, timestep, False)
            velocity = unconditional + scale * (velocity - unconditional)
        tokens = solver.step(velocity, index, tokens)
        on_step(index)
    return tokens
