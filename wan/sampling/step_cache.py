"""Steps whose velocity is taken from an earlier one: EasyCache (Zhou et al., 2025, arXiv 2507.02860).

Shapes: S = tokens held here, C = channels of a token.
Late in a schedule the model's output moves by an almost constant multiple of what its input moves. Where the movement
that this predicts, summed since the last evaluation, is small beside the output, the model is not asked: the velocity
is the input plus what the output was more than the input at that evaluation. As ComfyUI's node of this name has it, so
that a threshold means the same; the means are over all tokens of the first pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from .denoise import Predict

START, END = 0.15, 0.95
"""Part of the schedule's steps from which on, and up to which, one may be reused."""


class _Evaluation(NamedTuple):
    tokens: Tensor
    velocities: Sequence[Tensor]
    """Of each pass."""
    size: float
    """The mean one of the first pass's."""


class StepCache:
    """A `Predict` around another one.

    Args:
        predict: what evaluates the model.
        threshold: of the predicted relative movement; the larger, the more steps are reused. 0: none, at no cost.
        steps: those that run, in the schedule of `schedule_steps`.
        mean: a tensor like the tokens -> the mean of its elements' sizes over all ranks, alike on all of them, so that
            they decide alike.
    """

    def __init__(
        self, predict: Predict, *, threshold: float, steps: range, schedule_steps: int, mean: Callable[[Tensor], float]
    ) -> None:  # fmt: skip
        self._predict, self._threshold, self._mean = predict, threshold, mean
        self._indices, self._schedule_steps = iter(steps), schedule_steps
        self.reused: list[int] = []
        """Indices of the steps that were."""
        self._begin("")

    def _begin(self, expert: str) -> None:
        self._expert = expert
        self._last: _Evaluation | None = None
        self._rate: float | None = None
        self._moved = 0.0

    def __call__(self, expert: str, tokens: Tensor, timestep: float, passes: tuple[bool, ...]) -> Sequence[Tensor]:
        """One step: see `Predict`."""
        index = next(self._indices)
        if expert != self._expert:
            # Another model's output says nothing of this one's.
            self._begin(expert)
        within = START * self._schedule_steps <= index < END * self._schedule_steps
        if not within or self._threshold == 0:
            return self._predict(expert, tokens, timestep, passes)
        last = self._last
        moved = 0.0 if last is None else self._mean(tokens - last.tokens)
        if last is not None and self._rate is not None and last.size > 0:
            self._moved += self._rate * moved / last.size
            if self._moved < self._threshold:
                self.reused.append(index)
                return [tokens + (velocity - last.tokens) for velocity in last.velocities]
            self._moved = 0.0
        velocities = self._predict(expert, tokens, timestep, passes)
        if last is not None and moved > 0:
            self._rate = self._mean(velocities[0] - last.velocities[0]) / moved
        self._last = _Evaluation(tokens, velocities, self._mean(velocities[0]))
        return velocities
