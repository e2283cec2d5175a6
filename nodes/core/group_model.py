"""A transformer whose evaluations a group of processes computes, for ComfyUI's own samplers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...distributed.job.evaluator import Evaluator
from ...distributed.machine.cancelling import cancelled_by
from ..host import host
from ..host.core_model import CoreSampling
from ..host.exceptions import told_to_comfyui
from .evaluation import Evaluation
from .unsupported import check_parts, check_sampling

if TYPE_CHECKING:
    from torch import Tensor


class GroupModel:
    """As `core_model.Transformer` is asked.

    Args:
        prepare: checks what a sampling asks for and says how to get its evaluator, for the first evaluation. Raises
            ValueError.
    """

    def __init__(self, prepare: Callable[[CoreSampling], Callable[[], Evaluator]]) -> None:
        self._prepare = prepare
        self._running: list[Evaluation] = []
        """The last one is at work: a sampling may run inside of another one's step."""

    def check_parts(self, changed: Sequence[str]) -> None:
        check_parts(changed)

    def sample(self, sampling: CoreSampling, run: Callable[[], Tensor]) -> Tensor:
        check_sampling(sampling)
        with told_to_comfyui(), cancelled_by(host.interrupted):
            evaluation = Evaluation(self._prepare(sampling))
        self._running.append(evaluation)
        try:
            return run()
        finally:
            self._running.remove(evaluation)
            evaluation.close()

    def velocity(
        self, x: Tensor, timestep: Tensor, context: Tensor, options: Mapping[str, Any], conds: Mapping[str, Any]
    ) -> Tensor:
        if not self._running:
            raise ValueError(
                "a node computes with the model outside of a sampling, which runs in other processes then; load the "
                "model with Load Diffusion Model for it"
            )
        return self._running[-1].velocity(x, timestep, context, options, conds)
