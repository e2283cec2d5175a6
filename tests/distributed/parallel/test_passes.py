"""Evaluations that two halves of the ranks share: the model and the other half are made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from wan_pack.distributed.parallel import passes, sequence
from wan_pack.distributed.parallel.passes import Pass, evaluate_passes
from wan_pack.distributed.parallel.sequence import SequenceShard, mean_size
from wan_pack.wan.transformer.context import Context

ROPE: Any = (torch.zeros(1), torch.zeros(1))


def asked(number: int) -> Pass:
    which: Any = f"which {number}"
    beside: Any = f"beside {number}"
    return Pass(torch.full((3, 2), float(number)), torch.tensor([number]), Context(torch.zeros(1)), which, beside)


class Model:
    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def __call__(self, *given: Any) -> Tensor:
        self.seen.append(given)
        # Its columns are no neighbours in memory.
        return (10 * given[0]).t().contiguous().t()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_each_half_computes_one_of_two_neighbours_and_has_both(
    rank: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has no neighbour all of them compute."""
    model: Any = Model()
    mesh: Any = SimpleNamespace(cfg_size=2, cfg_group="across", cfg_rank=rank)

    def gather(whole: Tensor, mine: Tensor, *, group: str) -> None:
        assert group == "across" and mine.is_contiguous() and whole.shape == (6, 2)
        own = mine[0, 0].item()
        other = own + (10 if rank == 0 else -10)
        for half in (0, 1):
            whole[3 * half : 3 * half + 3] = own if half == rank else other

    monkeypatch.setattr(passes.dist, "all_gather_into_tensor", gather)
    found = evaluate_passes(model, [asked(number) for number in range(count)], ROPE, mesh)
    assert [velocity.unique().tolist() for velocity in found] == [[10.0 * number] for number in range(count)]
    mine = [number for number in range(count) if number % 2 == rank or (number == count - 1 and count % 2)]
    assert [given[1].item() for given in model.seen] == mine


@pytest.mark.parametrize("mesh", [None, SimpleNamespace(cfg_size=1, cfg_group=None)])
def test_alone_a_rank_computes_all_of_them_with_all_that_they_are_told(mesh: Any) -> None:
    model: Any = Model()
    both = [asked(0), asked(1)]
    found = evaluate_passes(model, both, ROPE, mesh)
    assert [velocity.unique().tolist() for velocity in found] == [[0.0], [10.0]]
    assert model.seen == [(one.tokens, one.timestep, one.text, ROPE, one.which, one.beside) for one in both]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_to_a_mean_each_rank_gives_the_sizes_of_its_own_tokens(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven of nine: the last rank has one, and two rows of padding."""
    given: list[float] = []
    monkeypatch.setattr(sequence.dist, "all_reduce", lambda total, *, group: given.append(total.item()))
    shard = SequenceShard(length=7, rank=rank, world=3)
    mean = mean_size(torch.full((3, 2), -1.5), shard, SimpleNamespace(size=lambda: 6))  # type: ignore[arg-type]
    tokens = 1 if rank == 2 else 3
    assert given == [tokens * 2 * 1.5] and mean == pytest.approx(given[0] / (7 * 2 * 2))
