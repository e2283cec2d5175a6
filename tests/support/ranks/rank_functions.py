"""What tests run on every rank (`ranks.run_ranks`). Each asserts, and may return a JSON dict."""

from __future__ import annotations

import contextlib
import functools
import resource
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from exchange_rank_functions import attention_equals_plain as attention_equals_plain
from exchange_rank_functions import hidden_exchange_equals_packed as hidden_exchange_equals_packed
from exchange_rank_functions import written_message_equals_packing as written_message_equals_packing
from vae_rank_functions import split_vae_equals_whole as split_vae_equals_whole
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.parallel.mesh import Mesh
from wan_pack.distributed.parallel.parallelize import release_gathered
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.parallel.shared_reading import SharedReading
from wan_pack.distributed.rank.expert import load_expert, relora_expert
from wan_pack.distributed.weights.offload import HostParking
from wan_pack.wan.checkpoint.checkpoint import Checkpoint
from wan_pack.wan.checkpoint.weights import local_rows
from wan_pack.wan.model.rope import rope_table
from wan_pack.wan.transformer.context import TextContext, pad_text

CPU = torch.device("cpu")


def _parallel(world: int, **settings: Any) -> Parallel:
    return Parallel(gpu_count=world, **{"mixed_precision": "fp32", "use_fsdp": True, **settings})


def _shard(parallel: Parallel, rank: int, world: int) -> SequenceShard:
    """This rank's part of the made-up video's 45 tokens."""
    split = parallel.use_ulysses and world > 1
    return SequenceShard(length=45, rank=rank if split else 0, world=world if split else 1)


def _load(folder: str, parallel: Parallel, mesh: Any, shard: SequenceShard) -> Any:
    files = sorted(str(file) for file in Path(folder).glob("*.safetensors"))
    return load_expert(files, parallel=parallel, mesh=mesh, shard=shard, device=CPU)


def _evaluate(
    model: Any, parallel: Parallel, mesh: Any, shard: SequenceShard, times: int = 2
) -> tuple[torch.Tensor, int]:
    """The velocity of made-up input, gathered, and how many tokens this rank computed."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(45, 4 * model.config.in_dim, generator=generator)
    rows = torch.randn(9, model.config.text_dim, generator=generator)
    text = TextContext(pad_text(rows), keep=not parallel.memory_optimization)
    rope = rope_table((3, 3, 5), model.config.head_dim, start=shard.start, stop=shard.stop)
    for _ in range(times):  # the second time on kept text
        local = model(shard.split(tokens), torch.tensor([700.0]), text, rope)
    return shard.gather(local, mesh.ulysses_group if mesh else None), local.shape[0]


def _velocity(folder: str, parallel: Parallel, mesh: Any, rank: int, world: int) -> tuple[torch.Tensor, Any, int]:
    """Loads and evaluates once: the velocity, the model, and how many tokens this rank computed."""
    shard = _shard(parallel, rank, world)
    model = _load(folder, parallel, mesh, shard)
    velocity, computed = _evaluate(model, parallel, mesh, shard)
    return velocity, model, computed


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
    plain, *_ = _velocity(folder, Parallel(gpu_count=1, mixed_precision="fp32"), None, 0, 1)
    tokens = []
    for options in settings:
        out, _, computed = _velocity(folder, _parallel(world, **options), mesh, rank, world)
        torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4, msg=lambda m, o=options: f"{o}: {m}")
        tokens.append(computed)
    counters = torch._dynamo.utils.counters
    return {
        "tokens": tokens,
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }


def fsdp_keeps_only_its_rows(rank: int, world: int, *, folder: str) -> dict[str, Any]:
    """Returns the bytes of this rank's shards, and checks each of them against the file."""
    from safetensors.torch import load_file

    mesh = Mesh.of("cpu", world)
    _, model, _ = _velocity(folder, _parallel(world), mesh, rank, world)
    whole = {name: t for file in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(file).items()}
    for name, parameter in model.named_parameters():
        rows, start = local_rows(parameter)
        expected = whole[name].flatten()[start : start + rows.numel()]
        assert torch.equal(rows.flatten(), expected.to(rows.dtype)), name
    kept = sum(local_rows(p)[0].numel() for p in model.parameters())
    return {"kept": kept, "whole": sum(t.numel() for t in whole.values())}


def offload_round_trip(rank: int, world: int, *, folder: str) -> dict[str, Any]:
    """A parked model holds no device memory and, fetched again, computes the same."""
    mesh = Mesh.of("cpu", world)
    before, model, _ = _velocity(folder, _parallel(world), mesh, rank, world)
    parking = HostParking(model)
    resident = parking.resident_bytes
    parking.park()
    parked = parking.resident_bytes
    parking.fetch()
    parallel = _parallel(world)
    after, _ = _evaluate(model, parallel, mesh, _shard(parallel, rank, world))
    assert torch.equal(after, before)
    return {"resident": resident, "parked": parked}


def peak_memory_of_loading(rank: int, world: int, *, folder: str) -> dict[str, int]:
    """Growth of this rank's peak resident memory while it loads a sharded checkpoint, in bytes."""
    mesh = Mesh.of("cpu", world)
    files = sorted(str(file) for file in Path(folder).glob("*.safetensors"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    load_expert(
        files, parallel=_parallel(world, mixed_precision="bf16"), mesh=mesh,
        shard=SequenceShard(length=45, rank=rank, world=world), device=CPU,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"growth": after - before, "checkpoint": Checkpoint(files).nbytes}


def fp8_under_fsdp(rank: int, world: int, *, fp8: str, bf16: str, lora: str) -> dict[str, int]:
    """fp8 shards give the velocity of their values in bf16, also after parking; merged shards are rows of the whole.

    Returns the bytes that this rank keeps of the blocks, from each file.
    """
    mesh = Mesh.of("cpu", world)
    parallel = _parallel(world, mixed_precision="bf16")
    kept, velocities = {}, []
    for name, folder in (("fp8", fp8), ("bf16", bf16)):
        velocity, model, _ = _velocity(folder, parallel, mesh, rank, world)
        kept[name] = HostParking(model.blocks).resident_bytes
        velocities.append(velocity)
        if name == "fp8":
            parking = HostParking(model)
            parking.park()
            assert parking.resident_bytes == 0
            parking.fetch()
            velocities.append(_evaluate(model, parallel, mesh, _shard(parallel, rank, world))[0])
    assert all(torch.equal(velocity, velocities[0]) for velocity in velocities)
    merged_shards(rank, world, folder=fp8, loras=[(lora, 1.0)], mixed_precision="bf16")
    return kept


def merged_shards(
    rank: int, world: int, *, folder: str, loras: list[tuple[str, float]], mixed_precision: str = "fp32"
) -> dict[str, int]:
    """Each rank's shard of weights with LoRAs has the rows of what one process makes. Returns the rows that it has."""
    mesh, parallel = Mesh.of("cpu", world), _parallel(world, mixed_precision=mixed_precision)
    files = [str(file) for file in Path(folder).glob("*.safetensors")]
    whole = load_expert(files, loras, parallel=parallel, mesh=None, shard=SequenceShard(length=45), device=CPU)
    sharded = load_expert(files, loras, parallel=parallel, mesh=mesh, shard=SequenceShard(length=45), device=CPU)
    parameters = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        rows, start = local_rows(parameter)
        expected = parameters[name].flatten()[start : start + rows.numel()]
        assert torch.equal(rows.flatten().float(), expected.float()), name
    return {name: len(local_rows(parameter)[0]) for name, parameter in sharded.named_parameters()}


def fp8_products_sharded(rank: int, world: int, *, folder: str) -> dict[str, int]:
    """fp8 products on shards of weights and tokens give what one process gives. Returns the bytes that are kept."""
    mesh = Mesh.of("cpu", world)
    settings = {"mixed_precision": "bf16", "linear_precision": "fp8"}
    plain, *_ = _velocity(folder, Parallel(gpu_count=1, **settings), None, 0, 1)
    for fsdp in (False, True):
        out, model, _ = _velocity(folder, _parallel(world, use_fsdp=fsdp, **settings), mesh, rank, world)
        error = ((out - plain).norm() / plain.norm()).item()
        assert error < 5e-3, f"use_fsdp {fsdp}: {error}"
    return {"bytes": HostParking(model).resident_bytes}


def gathered_expert(rank: int, world: int, *, folder: str) -> dict[str, Any]:
    """What FSDP keeps between forwards changes no velocity, also after parking.

    Returns, per kind of gathering, the all-gathers of two forwards, and whether weights stay gathered until released.
    """
    mesh = Mesh.of("cpu", world)
    plain, *_ = _velocity(folder, Parallel(gpu_count=1, mixed_precision="fp32"), None, 0, 1)
    gathers, kept = {}, {}
    for gather in ("block", "expert"):
        parallel = _parallel(world, gather=gather)
        shard = _shard(parallel, rank, world)
        model = _load(folder, parallel, mesh, shard)
        parking = HostParking(model)
        counts = []
        for _ in range(2):
            with _counted_gathers() as count:
                out, _ = _evaluate(model, parallel, mesh, shard, times=1)
            counts.append(count())
            torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4)
        gathers[gather] = counts
        kept[gather] = not hasattr(model.blocks[0].modulation, "placements")
        release_gathered(model)
        assert all(hasattr(parameter, "placements") for parameter in model.parameters())
        parking.park()
        parking.fetch()
        assert torch.equal(_evaluate(model, parallel, mesh, shard)[0], out)
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


def reading_is_shared(rank: int, world: int, *, folder: str, loras: list[tuple[str, float]]) -> dict[str, Any]:
    """Ranks that hold whole weights have, each, those of one process that reads all; also after a change of LoRAs.

    Returns the names that this rank has read, of the file and of what the LoRAs change.
    """
    files, shard = sorted(str(file) for file in Path(folder).glob("*.safetensors")), SequenceShard(length=45)
    read: list[str] = []
    read_into = Checkpoint.read_into

    def watched(checkpoint: Checkpoint, name: str, *rest: Any, **more: Any) -> None:
        read.append(name)
        read_into(checkpoint, name, *rest, **more)

    mesh, parallel = Mesh.of("cpu", world), _parallel(world, use_fsdp=False, mixed_precision="bf16")
    expected = [load_expert(files, of, parallel=parallel, mesh=None, shard=shard, device=CPU) for of in (loras, [])]
    with mock.patch.object(Checkpoint, "read_into", watched):
        model = load_expert(files, loras, parallel=parallel, mesh=mesh, shard=shard, device=CPU)
        whole = list(read)
        read.clear()
        halves = [(path, strength / 2) for path, strength in loras]
        reading = SharedReading.of(parallel, mesh, CPU)
        for to in (halves, loras):
            assert relora_expert(model, files, [path for path, _ in loras], to, reading=reading, device=CPU)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), expected[0].named_parameters(), strict=True):
        assert torch.equal(mine.view(-1).view(torch.uint8), theirs.view(-1).view(torch.uint8)), name
    assert any(
        not torch.equal(a.float(), b.float()) for a, b in zip(*map(torch.nn.Module.parameters, expected), strict=False)
    )
    return {"whole": whole, "changed": read}
