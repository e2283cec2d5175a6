"""What a rank keeps of one evaluation for the next."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from wan_pack.distributed.group.evaluation_request import Evaluation
from wan_pack.distributed.job.job import JobError
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.planning.gpu_memory import GUIDED_PROMPTS
from wan_pack.distributed.rank.forwards_work import KEPT_GRIDS, ForwardsWork


@pytest.fixture
def work() -> Any:
    """Without a job's folder, and with texts that are there."""
    work = object.__new__(ForwardsWork)
    work.device = torch.device("cpu")
    work.job = SimpleNamespace(parallel=SimpleNamespace(memory_optimization=False))
    work.texts = {name: torch.full((2, 4), float(i)) for i, name in enumerate("abcde")}
    work.contexts, work.pictures, work.placed = {}, {}, {}
    return work


def test_of_texts_the_two_that_were_used_last_keep_what_is_derived_of_them(work: Any) -> None:
    assert GUIDED_PROMPTS == 2
    first = work.contexts_of(("a", "b"))
    assert all(context.keep for context in first)
    again = work.contexts_of(("b", "a"))
    assert again[0] is first[1] and again[1] is first[0]
    (third,) = work.contexts_of(("c",))
    assert third.keep and list(work.contexts) == ["a", "c"], "b was used before a"
    many = work.contexts_of(("d", "e", "a", "d"))
    assert [context.keep for context in many] == [True, True, False, True] and many[0] is many[3]
    assert [context.tokens[0, 0].item() for context in many] == [3.0, 4.0, 0.0, 3.0]
    assert list(work.contexts) == ["d", "e"]
    with pytest.raises(JobError, match="the text x is asked for, but was never sent"):
        work.contexts_of(("a", "x"))


def test_with_memory_optimization_nothing_is_kept_of_texts(work: Any) -> None:
    work.job.parallel.memory_optimization = True
    assert not any(context.keep for context in work.contexts_of(("a", "b"))) and not work.contexts


def test_pictures_are_kept_while_they_are_the_same(work: Any) -> None:
    def seen(*pictures: str) -> list[Any]:
        evaluation = Evaluation(
            shape=(2, 16, 1, 2, 2), by_frame=False, texts=("0" * 64, "1" * 64), conditional=(True, False)
        )
        object.__setattr__(evaluation, "pictures", pictures)
        return work.pictures_of(evaluation)

    first = seen("a", "b")
    again = seen("b", "a")
    assert again[0] is first[1] and again[1] is first[0] and first[0].keep
    assert seen() == [None, None] and not work.pictures
    assert seen("a", "a")[0] is not first[0]
    work.job.parallel.memory_optimization = True
    assert not seen("c", "c")[0].keep
    with pytest.raises(JobError, match="the picture x is asked for"):
        seen("x", "x")


def test_places_of_the_sizes_that_were_used_last_are_kept(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int, int]] = []

    def shard(job: object, grid: tuple[int, int, int]) -> SequenceShard:
        made.append(grid)
        return SequenceShard(length=grid[0] * grid[1] * grid[2])

    work.session, work.config = SimpleNamespace(shard=shard), SimpleNamespace(head_dim=8)
    grids = [(n, 2, 3) for n in range(1, KEPT_GRIDS + 2)]
    for grid in (*grids[:KEPT_GRIDS], grids[0], grids[-1], grids[0], grids[1]):
        found, (cos, _) = work.places(grid)
        assert found.length == len(cos) == grid[0] * 6
    # Of the four kept the second was used longest ago when the fifth came.
    assert made == [*grids, grids[1]]
    assert len(work.placed) == KEPT_GRIDS
