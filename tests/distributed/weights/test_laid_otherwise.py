"""Weights that are laid otherwise: what each rank gives, takes and lets go, all of them in one process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import TINY, random_weights
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.parallel.mesh import Mesh
from wan_pack.distributed.weights import resharding
from wan_pack.wan.transformer.transformer import WanModel, meta_model


class Layout:
    """Of this process, in the place of one of three ranks: which rows of each weight it has, as FSDP divides them."""

    def __init__(self, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rank, self.world = rank, 3
        self.shards: dict[int, torch.Tensor] = {}
        """By id of the parameter that stands for it: what there is of it."""
        monkeypatch.setattr(resharding, "local_rows", self.local_rows)
        monkeypatch.setattr(resharding, "everywhere", lambda mine, group, device: mine)
        monkeypatch.setattr(resharding, "free_bytes", lambda device, ranks: 1 << 40)
        monkeypatch.setattr(Mesh, "group", SimpleNamespace(size=lambda: self.world))
        self.mesh = Mesh(None, None, None)  # type: ignore[arg-type]

    def rows_of(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        share = -(-len(whole) // self.world)
        return whole[rank * share : (rank + 1) * share]

    def local_rows(self, parameter: torch.Tensor) -> tuple[torch.Tensor, int]:
        held = self.shards.get(id(parameter))
        if held is not None:
            self.asked = id(parameter)
            return held, 0
        rows = self.rows_of(parameter.data, self.rank)
        start = min(self.rank * -(-len(parameter) // self.world), len(parameter))
        return (rows, start) if self.divides else (parameter.data, 0)

    divides = False
    """What is made is divided over the ranks; else each has all."""
    asked = 0
    """The parameter whose rows were asked for last."""


def small_model() -> WanModel:
    model = meta_model(TINY, torch.float32)
    model.load_state_dict(random_weights(TINY), assign=True)
    return model.requires_grad_(False)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_what_all_ranks_have_together_is_the_whole_and_its_shards_are_let_go(
    rank: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 32 rows 11, 11 and 10, of 80 27, 27 and 26; of a single one only the first rank has some."""
    layout, model = Layout(rank, monkeypatch), small_model()
    whole = {name: parameter.clone() for name, parameter in model.named_parameters()}
    layout.shards = {id(p): layout.rows_of(p.data, rank).clone() for p in model.parameters()}
    values = {id(parameter): whole[name] for name, parameter in model.named_parameters()}
    gathered: list[tuple[int, int]] = []

    def gather(everyone: torch.Tensor, mine: torch.Tensor, *, group: Any) -> None:
        assert group is layout.mesh.group and everyone.numel() == 3 * mine.numel()
        value = values[layout.asked]
        parts = [layout.rows_of(value, one).reshape(-1).view(torch.uint8) for one in range(3)]
        parts = [torch.cat((part, part.new_zeros(mine.numel() - part.numel()))) for part in parts]
        assert torch.equal(mine, parts[rank])
        gathered.append((layout.asked, mine.numel()))
        everyone.copy_(torch.cat(parts))

    monkeypatch.setattr(resharding.dist, "all_gather_into_tensor", gather)
    parallel = Parallel(gpu_count=3, use_fsdp=False, mixed_precision="fp32")
    clock = iter([3.0, 5.5])
    monkeypatch.setattr(resharding, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with caplog.at_level("INFO"):
        found = resharding.resharded(model, layout.mesh, parallel, torch.device("cpu"))
    assert caplog.messages == ["weights that lay here are now whole on every rank, after 2.50 s"]
    assert found is not None and len(gathered) == len(whole)
    moved, weights = found
    assert all(torch.equal(parameter, whole[name]) for name, parameter in moved.named_parameters())
    assert weights.resident_bytes == sum(value.nbytes for value in whole.values())
    assert all(shard.untyped_storage().nbytes() == 0 for shard in layout.shards.values())
    # Each as much as a rank has at most.
    assert dict(gathered) == {at: 4 * -(-len(value) // 3) * value[0].numel() for at, value in values.items()}


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("gather", ["block", "expert"])
def test_of_a_whole_a_rank_keeps_its_rows(rank: int, gather: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, model = Layout(rank, monkeypatch), small_model()
    whole = {name: parameter.clone() for name, parameter in model.named_parameters()}
    layout.shards = {id(parameter): parameter.data for parameter in model.parameters()}
    layout.divides = True
    sharded: list[Any] = []
    monkeypatch.setattr(resharding, "shard_weights", lambda *given: sharded.append(given))
    parallel = Parallel(gpu_count=3, use_fsdp=True, gather=gather, mixed_precision="fp32")
    found = resharding.resharded(model, layout.mesh, parallel, torch.device("cpu"))
    assert found is not None
    assert sharded == [(found[0], layout.mesh, gather)] and not any(p.is_meta for p in found[0].parameters())
    for name, parameter in found[0].named_parameters():
        assert torch.equal(layout.rows_of(parameter.data, rank), layout.rows_of(whole[name], rank)), name
    assert all(value.untyped_storage().nbytes() == 0 for value in layout.shards.values())


def test_one_rank_and_streamed_blocks_have_nothing_to_be_laid_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, model, cpu = Layout(0, monkeypatch), small_model(), torch.device("cpu")
    assert resharding.resharded(model, None, Parallel(gpu_count=1), cpu) is None
    streams = Parallel(gpu_count=3, use_fsdp=False, stream_blocks=True)
    assert resharding.resharded(model, layout.mesh, streams, cpu) is None
    assert all(parameter.untyped_storage().nbytes() for parameter in model.parameters())
