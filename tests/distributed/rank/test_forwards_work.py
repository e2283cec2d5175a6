"""What a rank keeps of one evaluation for the next."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from wan_pack.distributed.job.errors import JobError
from wan_pack.distributed.job.sampling import RoundedTimesteps
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.rank import forwards_work
from wan_pack.distributed.rank.forwards_work import KEPT_GRIDS, ForwardsWork
from wan_pack.wan.model.rope import rope_table
from wan_pack.wan.transformer.conditions import NOTHING


@pytest.fixture
def work() -> Any:
    """Without a job's folder."""
    work = object.__new__(ForwardsWork)
    work.device, work.job, work.placed = torch.device("cpu"), None, {}
    return work


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
    # Of a rank behind the first one its own.
    work.session.shard = lambda job, grid: SequenceShard(length=12, rank=1, world=2)
    (_, places), whole = work.places((2, 3, 2)), rope_table((2, 3, 2), 8)
    assert all(torch.equal(one, all_of_them[6:]) for one, all_of_them in zip(places, whole, strict=True))
    assert len(work.placed) == KEPT_GRIDS


@pytest.mark.parametrize(("by_frame", "timesteps", "exact"), [
    (False, [950.0], True), (False, [500.0], False), (False, [20.0], True),
    # A frame that is given has timestep 0.
    (True, [0.0, 500.0], False), (True, [0.0, 950.0], True),
])  # fmt: skip
def test_an_evaluation_is_of_its_own_tokens_and_exact_where_its_step_is(
    work: Any, monkeypatch: pytest.MonkeyPatch, by_frame: bool, timesteps: list[float], exact: bool
) -> None:
    """Whatever the last one was of. What comes back is behind the picture in front."""
    seen = SimpleNamespace(exact=None, shards=[], passes=[], roomy=[], answered=None)
    monkeypatch.setattr(forwards_work, "set_shard", lambda model, shard: seen.shards.append(shard))

    def evaluate(model: object, passes: Any, rope: object, mesh: object) -> list[torch.Tensor]:
        assert seen.exact is exact and len(seen.shards) == len(seen.roomy) > 0, "before it is computed"
        seen.passes += passes
        return [2 * one.tokens for one in passes]

    monkeypatch.setattr(forwards_work, "evaluate_passes", evaluate)
    work.session = SimpleNamespace(shard=lambda job, grid: SequenceShard(length=math.prod(grid)), mesh=None)
    work.config = SimpleNamespace(head_dim=8, in_dim=16, out_dim=16)
    work.job = SimpleNamespace(rounded=RoundedTimesteps(above=100.0, below=900.0))
    work.model = SimpleNamespace(compute_exactly=lambda value: setattr(seen, "exact", value))
    work.rank, work.make_room_for = 0, seen.roomy.append
    latents, text = torch.randn(1, 16, 2, 4, 6), object()
    views = [latents.numpy().data, torch.tensor([timesteps]).numpy().data, []]
    work.memory = SimpleNamespace(parts=lambda evaluation: views)
    work.conditions = SimpleNamespace(
        check=lambda _: None, take=lambda *_: None, texts=lambda _: [text], besides=lambda *_: [NOTHING]
    )
    work.answer = lambda evaluation, latents, velocity: setattr(seen, "answered", velocity)
    for in_front in (0, 1):
        seen.exact = None
        work.serve(SimpleNamespace(shape=(1, 16, 2, 4, 6), in_front=in_front, by_frame=by_frame))
        assert torch.equal(seen.answered, 2 * latents)
        assert seen.shards[-1].length == (2 + in_front) * 2 * 3 == len(seen.passes[-1].tokens)
        assert seen.passes[-1].text is text
        if by_frame:
            break


def test_latents_of_another_model_are_refused(work: Any) -> None:
    work.config = SimpleNamespace(in_dim=36)
    with pytest.raises(JobError, match=r"^the latents have 16 channels; this model takes 36$"):
        work.serve(SimpleNamespace(shape=(1, 16, 2, 4, 6)))
