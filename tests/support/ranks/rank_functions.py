"""What tests run on every rank (`ranks.run_ranks`). Each asserts, and may return a JSON dict."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from exchange_rank_functions import attention_equals_plain as attention_equals_plain
from exchange_rank_functions import hidden_exchange_equals_packed as hidden_exchange_equals_packed
from exchange_rank_functions import models_take_turns as models_take_turns
from exchange_rank_functions import (
    one_that_cannot_share_memory_keeps_nobody_waiting as one_that_cannot_share_memory_keeps_nobody_waiting,
)
from exchange_rank_functions import written_message_equals_packing as written_message_equals_packing
from made_up_video import CPU, load_folder, spread_over, tokens_of, velocity_by, velocity_of
from vae_rank_functions import split_vae_equals_whole as split_vae_equals_whole
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.parallel.mesh import Mesh
from wan_pack.distributed.parallel.parallelize import release_gathered
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.rank.expert import load_expert
from wan_pack.distributed.weights.offload import HostParking
from wan_pack.distributed.weights.warm_up import first_evaluation
from wan_pack.wan.checkpoint.weights import local_rows
from weights_rank_functions import codes_spread as codes_spread
from weights_rank_functions import exactness_spread as exactness_spread
from weights_rank_functions import fp8_products_sharded as fp8_products_sharded
from weights_rank_functions import fp8_under_fsdp as fp8_under_fsdp
from weights_rank_functions import merged_shards as merged_shards
from weights_rank_functions import reading_is_shared as reading_is_shared
from weights_rank_functions import weights_are_laid_otherwise as weights_are_laid_otherwise


def options_equal_plain(
    rank: int, world: int, *, folder: str, settings: list[dict[str, Any]], backend: str = "inductor"
) -> dict[str, Any]:
    """Every combination of options gives the velocity of one process without any.

    Args:
        backend: torch.compile's on rank 0. On the others what is captured runs as it is: one C++ compiler is enough.
    Returns:
        the tokens that this rank computed under each, and what was compiled.
    """
    torch.compile = functools.partial(torch.compile, backend=backend if rank == 0 else "eager")
    mesh = Mesh.of("cpu", world)
    plain, *_ = velocity_of(folder, Parallel(gpu_count=1, mixed_precision="fp32"), None, 0, 1)
    tokens = []
    for options in settings:
        out, _, computed = velocity_of(folder, spread_over(world, **options), mesh, rank, world)
        torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4, msg=lambda m, o=options: f"{o}: {m}")
        tokens.append(computed)
    counters = torch._dynamo.utils.counters
    return {
        "tokens": tokens,
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }


def warmed_up_equals_fresh(rank: int, world: int, *, folder: str, engine: str) -> None:
    """Also on the halves of the ranks, which compute a pass each."""
    for cfg in (1, 2):
        mesh = Mesh.of("cpu", world, cfg=cfg)
        parallel = spread_over(world, use_fsdp=False, ulysses_engine=engine, cfg_parallel=cfg == 2)
        shard = SequenceShard(length=45, rank=mesh.ulysses_rank, world=mesh.ulysses_size)
        plain, _ = velocity_by(load_folder(folder, parallel, mesh, shard), parallel, mesh, shard)
        model = load_folder(folder, parallel, mesh, shard)
        first_evaluation(model, shard, mesh, CPU)
        warmed, _ = velocity_by(model, parallel, mesh, shard)
        assert torch.equal(warmed, plain), (engine, cfg)


def fsdp_keeps_only_its_rows(rank: int, world: int, *, folder: str) -> dict[str, Any]:
    """Returns the bytes of this rank's shards, and checks each of them against the file."""
    from safetensors.torch import load_file
    from torch.distributed.fsdp import FSDPModule

    mesh = Mesh.of("cpu", world)
    _, model, _ = velocity_of(folder, spread_over(world), mesh, rank, world)
    assert all(isinstance(unit, FSDPModule) for unit in model.units), "each is gathered by itself"
    whole = {name: t for file in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(file).items()}
    for name, parameter in model.named_parameters():
        rows, row = local_rows(parameter)
        expected = whole[name][row : row + rows.shape[0]]
        assert torch.equal(rows, expected.to(rows.dtype)), name
    kept = sum(local_rows(p)[0].numel() for p in model.parameters())
    return {"kept": kept, "whole": sum(t.numel() for t in whole.values())}


def offload_round_trip(rank: int, world: int, *, folder: str) -> dict[str, Any]:
    """A parked model holds no device memory and, fetched again, computes the same."""
    mesh = Mesh.of("cpu", world)
    before, model, _ = velocity_of(folder, spread_over(world), mesh, rank, world)
    parking = HostParking(model)
    resident = parking.resident_bytes
    parking.park()
    parked = parking.resident_bytes
    parking.fetch()
    parallel = spread_over(world)
    after, _ = velocity_by(model, parallel, mesh, tokens_of(parallel, rank, world))
    assert torch.equal(after, before)
    return {"resident": resident, "parked": parked}


def peak_memory_of_loading(rank: int, world: int, *, folder: str) -> dict[str, int]:
    """Growth of this rank's peak resident memory while it loads a sharded checkpoint, in bytes."""
    mesh = Mesh.of("cpu", world)
    files = sorted(str(file) for file in Path(folder).glob("*.safetensors"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    load_expert(
        files, parallel=spread_over(world, mixed_precision="bf16"), mesh=mesh,
        shard=SequenceShard(length=45, rank=rank, world=world), device=CPU,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"growth": after - before, "checkpoint": sum(os.path.getsize(file) for file in files)}


def gathered_expert(rank: int, world: int, *, folder: str) -> dict[str, Any]:
    """What FSDP keeps between forwards changes no velocity, also after parking.

    Returns, per kind of gathering, the all-gathers of two forwards, and whether weights stay gathered until released.
    """
    mesh = Mesh.of("cpu", world)
    plain, *_ = velocity_of(folder, Parallel(gpu_count=1, mixed_precision="fp32"), None, 0, 1)
    gathers, kept = {}, {}
    for gather in ("block", "expert"):
        parallel = spread_over(world, gather=gather)
        shard = tokens_of(parallel, rank, world)
        model = load_folder(folder, parallel, mesh, shard)
        parking = HostParking(model)
        counts = []
        for _ in range(2):
            with _counted_gathers() as count:
                out, _ = velocity_by(model, parallel, mesh, shard, times=1)
            counts.append(count())
            torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4)
        gathers[gather] = counts
        kept[gather] = not hasattr(model.blocks[0].modulation, "placements")
        release_gathered(model)
        assert all(hasattr(parameter, "placements") for parameter in model.parameters())
        parking.park()
        parking.fetch()
        assert torch.equal(velocity_by(model, parallel, mesh, shard)[0], out)
    return {"gathers": gathers, "kept": kept}


@contextlib.contextmanager
def _counted_gathers() -> Iterator[Callable[[], int]]:
    """Counts the groups of parameters that FSDP gathers."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as module

    calls, original = [], module.foreach_all_gather
    module.foreach_all_gather = lambda *args, **options: (calls.append(1), original(*args, **options))[1]
    try:
        yield lambda: len(calls)
    finally:
        module.foreach_all_gather = original


def a_missing_peer_is_noticed_in_time(rank: int, world: int) -> None:
    """In a row and in a column of the mesh, as in the whole: the limit is the job's, not torch's."""
    mesh = Mesh.of("cpu", world, cfg=2, timeout=timedelta(seconds=1))
    assert (mesh.cfg_rank, mesh.ulysses_rank) == divmod(rank, world // 2)
    if rank == 0:
        for group in (mesh.ulysses_group, mesh.cfg_group):
            started = time.monotonic()
            try:
                dist.all_reduce(torch.zeros(1), group=group)
            except RuntimeError:
                assert 0.5 < time.monotonic() - started < 20
            else:
                raise AssertionError("nobody else was there")
    # The others stay until then: a peer that has ended is noticed at once.
    dist.barrier()
