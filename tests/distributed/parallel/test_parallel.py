"""What runs on several ranks equals what runs on one."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import TINY, random_weights, write_official
from wan_pack.distributed.parallel import sequence
from wan_pack.distributed.parallel.sequence import SequenceShard, mean_size, split_evenly
from wan_pack.wan.model.config import WanConfig


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_official(tmp_path_factory.mktemp("tiny"), random_weights()))


def test_packed_attention_for_every_gpu_count_and_head_count():
    """1 to 8 ranks with 40, 24 and 12 heads, fewer heads than ranks, and lengths that do not divide."""
    run_ranks(
        "attention_equals_plain", 8, engine="packed", sizes=list(range(1, 9)), heads=[40, 24, 12, 3], lengths=[16, 45]
    )


def test_heads_that_a_kernel_writes_into_the_message_equal_packing():
    """Heads that divide or not, and ranks without one; videos of two lengths through one exchange."""
    run_ranks("written_message_equals_packing", 3, sizes=[2, 3], heads=[12, 5, 2], lengths=[16, 45])


@pytest.mark.parametrize("relayed", [False, True])
def test_a_hidden_exchange_gives_the_bits_of_the_packed_one(tmp_path: Path, relayed: bool):
    """Between processes; test_symmetric.py has every way and number of heads."""
    sizes, heads, lengths = [2, 3], [24, 5, 2], [16, 45]
    folder = "" if relayed else str(tmp_path)
    results = run_ranks("hidden_exchange_equals_packed", 3, folder=folder, sizes=sizes, heads=heads, lengths=lengths)
    each = len(heads) * 8
    assert [result["compared"] for result in results] == [2 * each, 2 * each, each]


def test_models_take_turns_in_the_memory_of_a_group():
    run_ranks("models_take_turns", 2)


def test_one_rank_that_cannot_share_memory_keeps_nobody_waiting():
    run_ranks("one_that_cannot_share_memory_keeps_nobody_waiting", 2)


def test_deepspeed_attention_where_heads_divide():
    run_ranks("attention_equals_plain", 4, engine="deepspeed", sizes=[4], heads=[4, 40], lengths=[16, 45])


def test_deepspeed_builds_nothing_and_waits_for_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A process that was killed while it built left a lock, for which every later one would wait."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    run_ranks("attention_equals_plain", 2, engine="deepspeed", sizes=[2], heads=[4], lengths=[16])
    assert list(tmp_path.rglob("*")) == [lock.parent, lock]


def test_rows_and_columns_of_ranks_have_the_jobs_time_limit():
    run_ranks("a_missing_peer_is_noticed_in_time", 4)


def test_every_option_alone_and_combined(checkpoint: str):
    """Ulysses, FSDP and memory optimization in every mix that is allowed."""
    settings = [
        {"use_ulysses": ulysses, "use_fsdp": fsdp, "memory_optimization": memory}
        for ulysses, fsdp, memory in product([True, False], repeat=3)
        if ulysses or fsdp
    ]
    # Between processes without a GPU it is relayed.
    settings.append({"use_ulysses": True, "ulysses_engine": "symmetric"})
    for result in run_ranks("options_equal_plain", 2, folder=checkpoint, settings=settings):
        # Of 45 tokens: half with Ulysses, all without.
        assert result["tokens"] == [23 if options["use_ulysses"] else 45 for options in settings]
        assert result["graphs"] == 0


@pytest.mark.parametrize(
    ("settings", "backend"),
    [
        ({}, "inductor"),
        # What is captured is the same without the code generator, which takes half a minute.
        ({"use_fsdp": False, "memory_optimization": True}, "eager"),
    ],
)
def test_torch_compile_with_ulysses_and_fsdp(checkpoint: str, settings: dict[str, bool], backend: str):
    """Four graphs, shared by all blocks, and no collective in them: that would break a graph."""
    settings = {"torch_compile": True, **settings}
    for result in run_ranks("options_equal_plain", 2, folder=checkpoint, settings=[settings], backend=backend):
        assert (result["graphs"], result["breaks"]) == (4, 0)


def test_fsdp_shards_hold_the_files_rows(checkpoint: str):
    results = run_ranks("fsdp_keeps_only_its_rows", 3, folder=checkpoint)
    assert sum(result["kept"] for result in results) == results[0]["whole"]
    assert max(result["kept"] for result in results) < 0.45 * results[0]["whole"]


def test_offload_frees_the_device_and_restores(checkpoint: str):
    for result in run_ranks("offload_round_trip", 2, folder=checkpoint):
        assert result["resident"] > 0
        assert result["parked"] == 0


def test_host_memory_of_loading_is_the_share_plus_a_constant(tmp_path: Path):
    """Not one whole copy per rank, which is what fills a host's memory with eight ranks."""
    config = WanConfig(
        dim=1024, ffn_dim=4096, num_heads=8, num_layers=24, in_dim=16, out_dim=16, text_dim=256, freq_dim=256
    )
    weights = {name: tensor.bfloat16() for name, tensor in random_weights(config).items()}
    folder = write_official(tmp_path / "large", weights, config, shards=3)
    del weights
    results = run_ranks("peak_memory_of_loading", 2, folder=str(folder))
    size = results[0]["checkpoint"]
    assert size > 700 << 20
    for result in results:
        assert result["growth"] < size / 2 + (160 << 20), result


@pytest.mark.parametrize(("length", "world"), [(63, 2), (7, 4), (8, 8), (5, 8), (1, 3)])
def test_shards_cover_the_sequence_once(length: int, world: int):
    import torch

    tokens = torch.arange(length, dtype=torch.float32)[:, None] + 1
    parts = [SequenceShard(length=length, rank=r, world=world).split(tokens) for r in range(world)]
    assert len({part.shape for part in parts}) == 1
    assert torch.equal(torch.cat(parts)[:length], tokens)
    assert not torch.cat(parts)[length:].any()


def test_heads_are_split_as_evenly_as_they_go():
    assert split_evenly(40, 3) == [14, 13, 13]
    assert split_evenly(2, 4) == [1, 1, 0, 0]
    assert TINY.num_heads == sum(split_evenly(TINY.num_heads, 3))


@pytest.mark.parametrize(("world", "ranks"), [(2, 2), (2, 4), (3, 3)])
def test_a_mean_over_ranks_is_that_of_the_whole(world: int, ranks: int, monkeypatch: pytest.MonkeyPatch):
    """Padding does not count; tokens that two halves of the ranks hold count once."""
    whole = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    shards = [SequenceShard(length=7, rank=rank % world, world=world) for rank in range(ranks)]
    sums = [shard.split(whole)[: max(0, 7 - shard.start)].abs().sum(dtype=torch.float64).item() for shard in shards]
    monkeypatch.setattr(sequence.dist, "all_reduce", lambda total, group: total.fill_(sum(sums)))
    for shard in shards:
        # What padding rows hold after a model has been through is not zero.
        local = shard.split(whole) + (torch.arange(shard.size) + shard.start >= 7)[:, None] * 100.0
        found = mean_size(local, shard, SimpleNamespace(size=lambda: ranks))  # type: ignore[arg-type]
        assert found == pytest.approx(whole.abs().mean().item(), rel=1e-6)
    assert mean_size(whole, SequenceShard(length=7), None) == pytest.approx(whole.abs().mean().item(), rel=1e-6)
    # A long video has more elements than float32 has digits.
    assert mean_size(torch.tensor([[2.0**24, 1.0]]), SequenceShard(length=1), None) == (2**24 + 1) / 2


@pytest.fixture
def all_alike(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Three ranks: this one, and two that have what this one has, one more in each place."""

    def gather(out: torch.Tensor, mine: torch.Tensor, group: object = None) -> None:
        assert mine.is_contiguous()
        out.view(3, -1).copy_(torch.stack([mine.reshape(-1) + i for i in range(3)]))

    monkeypatch.setattr(sequence.dist, "all_gather_into_tensor", gather)
    monkeypatch.setattr(sequence.dist, "get_world_size", lambda: 3)
    return SimpleNamespace(size=lambda: 3)


def test_short_values_and_rows_of_every_rank_come_in_their_order(all_alike: Any):
    assert sequence.gather_bytes(b"ad", torch.device("cpu")) == [b"ad", b"be", b"cf"]
    assert sequence.gather_rows(torch.tensor([5, -1]), all_alike) == [[5, -1], [6, 0], [7, 1]]


@pytest.mark.parametrize("ordered", [False, True])
def test_the_tokens_of_all_ranks_are_the_video_without_padding(all_alike: Any, ordered: bool):
    order = torch.tensor([6, 0, 1, 2, 3, 4, 5]) if ordered else None
    shard = SequenceShard(length=7, rank=0, world=3, order=order)
    # Of this rank's tokens columns that are not neighbours in memory.
    local = torch.arange(12.0).view(2, 6).t()[:3]
    found = shard.gather(local, all_alike)
    whole = torch.cat([local, local + 1, local + 2])[:7]
    expected = torch.empty_like(whole)
    expected[range(7) if order is None else order] = whole
    assert torch.equal(found, expected)


@pytest.mark.parametrize("everyone", [0, 1])
def test_it_is_so_everywhere_if_every_rank_says_so(everyone: int, monkeypatch: pytest.MonkeyPatch):
    def reduce(flag: torch.Tensor, how: object, group: object) -> None:
        assert how == sequence.dist.ReduceOp.MIN
        flag.clamp_max_(everyone)

    monkeypatch.setattr(sequence.dist, "all_reduce", reduce)
    for mine in (True, False):
        assert sequence.everywhere(mine, None, torch.device("cpu")) is (mine and bool(everyone))  # type: ignore[arg-type]
