"""Evaluations of a model that may run at the same time, spread over the halves of the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from ...wan.model.ops import Rope
from ...wan.transformer.conditions import NOTHING, Beside
from ...wan.transformer.context import Context
from ...wan.transformer.transformer import WanModel
from .mesh import Mesh


@dataclass(frozen=True, slots=True)
class Pass:
    """One evaluation of a model, of this rank's tokens."""

    tokens: Tensor
    """[S, 4 * in_dim]."""
    timestep: Tensor
    """[n]: see `WanModel.forward`."""
    text: Context
    which: Tensor | None = None
    """[S]: see `WanModel.forward`."""
    beside: Beside = NOTHING


def evaluate_passes(model: WanModel, passes: Sequence[Pass], rope: Rope, mesh: Mesh | None) -> list[Tensor]:
    """The velocity of each pass, [S, 4 * out_dim], float32. Collective.

    One after another; where the mesh has two halves each of them computes one of two neighbours.
    """

    def evaluate(asked: Pass) -> Tensor:
        return model(asked.tokens, asked.timestep, asked.text, rope, asked.which, asked.beside)

    velocities: list[Tensor] = []
    size = 1 if mesh is None else mesh.cfg_size
    for first in range(0, len(passes), size):
        together = passes[first : first + size]
        if mesh is None or mesh.cfg_group is None or len(together) < size:
            velocities += map(evaluate, together)
            continue
        mine = evaluate(together[mesh.cfg_rank])
        all_of_them = mine.new_empty(size * mine.shape[0], mine.shape[1])
        dist.all_gather_into_tensor(all_of_them, mine.contiguous(), group=mesh.cfg_group)
        velocities += all_of_them.chunk(size)
    return velocities
