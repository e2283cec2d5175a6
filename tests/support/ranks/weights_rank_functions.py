"""What tests of weights run on every rank: sharded, shared, in 8 bits, with LoRAs (`rank_functions.py`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from layers import attention_on_codes
from made_up_video import CPU, spread_over, tokens_of, velocity_by, velocity_of
from peer_files import reach_as_gpus
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.parallel import symmetric
from wan_pack.distributed.parallel.mesh import Mesh
from wan_pack.distributed.parallel.parallelize import Computing, compute_as
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.parallel.shared_reading import SharedReading
from wan_pack.distributed.rank.expert import load_expert, relora_expert
from wan_pack.distributed.weights.offload import HostParking
from wan_pack.distributed.weights.resharding import resharded
from wan_pack.wan.checkpoint.checkpoint import Checkpoint
from wan_pack.wan.checkpoint.weights import local_rows
from wan_pack.wan.model.attention import attention
from wan_pack.wan.model.codes import CodesAttention


def fp8_under_fsdp(rank: int, world: int, *, fp8: str, bf16: str, lora: str) -> dict[str, int]:
    """fp8 shards give the velocity of their values in bf16, also after parking; merged shards are rows of the whole.

    Returns the bytes that this rank keeps of the blocks, from each file.
    """
    mesh = Mesh.of("cpu", world)
    parallel = spread_over(world, mixed_precision="bf16")
    kept, velocities = {}, []
    for name, folder in (("fp8", fp8), ("bf16", bf16)):
        velocity, model, _ = velocity_of(folder, parallel, mesh, rank, world)
        kept[name] = HostParking(model.blocks).resident_bytes
        velocities.append(velocity)
        if name == "fp8":
            parking = HostParking(model)
            parking.park()
            assert parking.resident_bytes == 0
            parking.fetch()
            velocities.append(velocity_by(model, parallel, mesh, tokens_of(parallel, rank, world))[0])
    assert all(torch.equal(velocity, velocities[0]) for velocity in velocities)
    merged_shards(rank, world, folder=fp8, loras=[(lora, 1.0)], mixed_precision="bf16")
    return kept


def merged_shards(
    rank: int,
    world: int,
    *,
    folder: str,
    loras: list[tuple[str, float]],
    mixed_precision: str = "fp32",
    quantised_loras: str = "merged",
) -> dict[str, int]:
    """Each rank's shard of weights with LoRAs has the rows of what one process makes. Returns the rows that it has."""
    mesh, parallel = (
        Mesh.of("cpu", world),
        spread_over(world, mixed_precision=mixed_precision, quantised_loras=quantised_loras),
    )
    files = [str(file) for file in Path(folder).glob("*.safetensors")]
    whole = load_expert(files, loras, parallel=parallel, mesh=None, shard=SequenceShard(length=45), device=CPU)
    sharded = load_expert(files, loras, parallel=parallel, mesh=mesh, shard=SequenceShard(length=45), device=CPU)
    parameters = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        rows, row = local_rows(parameter)
        expected = parameters[name][row : row + rows.shape[0]]
        assert torch.equal(rows.float(), expected.float()), name
    return {name: len(local_rows(parameter)[0]) for name, parameter in sharded.named_parameters()}


def codes_spread(
    rank: int, world: int, *, folder: str, loras: list[tuple[str, float]], settings: dict[str, Any]
) -> dict[str, Any]:
    """Weights in 8 bits, with LoRAs, on shards of weights and tokens or on whole ones give what one process gives, also
    parked, streamed and with other strengths. Returns the bytes that are kept of the blocks with FSDP, and the tensors
    of the checkpoint that the other strengths read."""
    mesh, files = Mesh.of("cpu", world), [str(file) for file in Path(folder).glob("*.safetensors")]

    def load(parallel: Parallel, loras: list[tuple[str, float]], mesh: Mesh | None) -> tuple[Any, Any]:
        found: list[Any] = []
        shard = tokens_of(parallel, rank if mesh is not None else 0, parallel.gpu_count)
        model = load_expert(
            files, loras, parallel=parallel, mesh=mesh, shard=shard, device=CPU, on_weights=found.append
        )
        return model, found[0]

    def evaluate(model: Any, parallel: Parallel, mesh: Mesh | None) -> torch.Tensor:
        shard = tokens_of(parallel, rank if mesh is not None else 0, parallel.gpu_count)
        return velocity_by(model, parallel, mesh, shard, times=1)[0]

    def near(out: torch.Tensor, plain: torch.Tensor, what: str) -> None:
        error = ((out - plain).norm() / plain.norm()).item()
        assert error < 5e-3, f"{what}: {error}"

    one = Parallel(gpu_count=1, **settings)
    halves = [(path, strength / 2) for path, strength in loras]
    plain, half = (evaluate(load(one, of, None)[0], one, None) for of in (loras, halves))
    assert loras == [] or (half - plain).norm() > 2e-2 * plain.norm()
    kept, read = {}, []
    for how in ({"use_fsdp": True}, {"use_fsdp": False}, {"use_fsdp": False, "stream_blocks": True}):
        parallel = spread_over(world, **how, **settings)
        model, weights = load(parallel, loras, mesh)
        near(evaluate(model, parallel, mesh), plain, str(how))
        weights.park()
        weights.fetch()
        near(evaluate(model, parallel, mesh), plain, f"{how}, parked")
        if parallel.use_fsdp:
            kept["bytes"] = HostParking(model.blocks).resident_bytes
        with _names_read() as more, weights.writable():
            reading = SharedReading.of(parallel, mesh, CPU)
            before = [path for path, _ in loras]
            assert relora_expert(model, files, before, halves, parallel=parallel, reading=reading, device=CPU)
        read += more
        near(evaluate(model, parallel, mesh), half, f"{how}, half")
    return {**kept, "read": read}


def fp8_products_sharded(rank: int, world: int, *, folder: str) -> dict[str, int]:
    """fp8 products on shards of weights and tokens give what one process gives. Returns the bytes that are kept."""
    mesh = Mesh.of("cpu", world)
    settings = {"mixed_precision": "bf16", "linear_precision": "fp8"}
    plain, *_ = velocity_of(folder, Parallel(gpu_count=1, **settings), None, 0, 1)
    for fsdp in (False, True):
        out, model, _ = velocity_of(folder, spread_over(world, use_fsdp=fsdp, **settings), mesh, rank, world)
        error = ((out - plain).norm() / plain.norm()).item()
        assert error < 5e-3, f"use_fsdp {fsdp}: {error}"
    return {"bytes": HostParking(model).resident_bytes}


def reading_is_shared(
    rank: int, world: int, *, folder: str, loras: list[tuple[str, float]], quantised_loras: str
) -> dict[str, Any]:
    """Ranks that hold whole weights have, each, those of one process that reads all; also after a change of LoRAs.

    Args:
        quantised_loras: of `Switches`.
    Returns:
        the names that this rank has read, of the file and of what the LoRAs change.
    """
    files, shard = sorted(str(file) for file in Path(folder).glob("*.safetensors")), SequenceShard(length=45)
    mesh = Mesh.of("cpu", world)
    parallel = spread_over(world, use_fsdp=False, mixed_precision="bf16", quantised_loras=quantised_loras)
    expected = [load_expert(files, of, parallel=parallel, mesh=None, shard=shard, device=CPU) for of in (loras, [])]
    with _names_read() as read:
        model = load_expert(files, loras, parallel=parallel, mesh=mesh, shard=shard, device=CPU)
        whole = list(read)
        read.clear()
        halves = [(path, strength / 2) for path, strength in loras]
        reading = SharedReading.of(parallel, mesh, CPU)
        for to in (halves, loras):
            assert relora_expert(
                model, files, [path for path, _ in loras], to, parallel=parallel, reading=reading, device=CPU
            )
    for (name, mine), (_, theirs) in zip(model.named_parameters(), expected[0].named_parameters(), strict=True):
        assert torch.equal(mine.view(-1).view(torch.uint8), theirs.view(-1).view(torch.uint8)), name
    assert any(
        not torch.equal(a.float(), b.float()) for a, b in zip(*map(torch.nn.Module.parameters, expected), strict=False)
    )
    return {"whole": whole, "changed": read}


def weights_are_laid_otherwise(
    rank: int, world: int, *, folder: str, loras: list[tuple[str, float]], settings: dict[str, Any]
) -> None:
    """From whole on every rank to shards, to shards and back, weights have the bits of a fresh load and give its
    velocity; LoRAs can be changed then as always; nothing is read, and what was there before is let go."""
    mesh, files = Mesh.of("cpu", world), sorted(str(file) for file in Path(folder).glob("*.safetensors"))
    gathers = {False: ("block",), True: ("block", "expert")}
    plans = {
        (fsdp, gather): spread_over(world, use_fsdp=fsdp, gather=gather, **settings)
        for fsdp in gathers
        for gather in gathers[fsdp]
    }
    shard = tokens_of(plans[False, "block"], rank, world)

    def load(parallel: Parallel, of: list[tuple[str, float]]) -> Any:
        return load_expert(files, of, parallel=parallel, mesh=mesh, shard=shard, device=CPU)

    def bits(model: Any) -> dict[str, torch.Tensor]:
        return {
            name: local_rows(parameter)[0].reshape(-1).view(torch.uint8) for name, parameter in model.named_parameters()
        }

    def same(model: Any, fresh: Any, parallel: Parallel) -> None:
        mine, theirs = bits(model), bits(fresh)
        assert list(mine) == list(theirs)
        assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
        velocities = [velocity_by(each, parallel, mesh, shard)[0] for each in (model, fresh)]
        assert torch.equal(*velocities), parallel

    halves = [(path, strength / 2) for path, strength in loras]
    model = load(plans[False, "block"], loras)
    for where in ((True, "block"), (False, "block"), (True, "expert"), (False, "block")):
        parallel, before = plans[where], model
        with _names_read() as read:
            moved = resharded(model, mesh, parallel, CPU)
        assert moved is not None and read == []
        model, weights = moved
        assert HostParking(before).resident_bytes == 0
        fresh = load(parallel, loras)
        assert weights.resident_bytes == HostParking(fresh).resident_bytes
        compute_as(model, mesh, shard, Computing.of(parallel, attention, "plain"))
        same(model, fresh, parallel)
        weights.park()
        weights.fetch()
        same(model, fresh, parallel)
    for parallel in (plans[False, "block"], plans[True, "block"]):
        if parallel.sharded:
            model, _ = resharded(model, mesh, parallel, CPU) or (None, None)
            compute_as(model, mesh, shard, Computing.of(parallel, attention, "plain"))
        for to, was in ((halves, loras), (loras, halves)):
            reading = SharedReading.of(parallel, mesh, CPU)
            before_paths = [path for path, _ in was]
            assert relora_expert(model, files, before_paths, to, parallel=parallel, reading=reading, device=CPU)
            same(model, load(parallel, to), parallel)
    # Blocks that come and go are where they are.
    streamed = spread_over(world, use_fsdp=False, stream_blocks=True, **settings)
    assert resharded(model, mesh, streamed, CPU) is None and resharded(model, None, plans[True, "block"], CPU) is None


@contextlib.contextmanager
def _names_read() -> Iterator[list[str]]:
    """Of the checkpoint's tensors that are read inside."""
    read: list[str] = []
    read_into = Checkpoint.read_into

    def watched(checkpoint: Checkpoint, name: str, *rest: Any, **more: Any) -> None:
        read.append(name)
        read_into(checkpoint, name, *rest, **more)

    with mock.patch.object(Checkpoint, "read_into", watched):
        yield read


def exactness_spread(rank: int, world: int, *, folder: str, memory: str) -> None:
    """Exact and rounded steps of a model with an exact block are those of one process, one after another.

    Args:
        memory: a folder for memory that ranks reach as GPUs with peer access do.
    """
    reach_as_gpus(Path(memory))
    # As a GPU's kernel returns it.
    in_bf16 = CodesAttention(lambda q, k, v: attention_on_codes(q, k, v).to(torch.bfloat16))
    mesh, files = Mesh.of("cpu", world), [str(file) for file in Path(folder).glob("*.safetensors")]
    settings = {"linear_precision": "fp8", "mixed_precision": "bf16", "exact_blocks": "1"}

    def velocities(parallel: Parallel, mesh: Mesh | None) -> list[torch.Tensor]:
        shard = tokens_of(parallel, rank, parallel.gpu_count)
        model = load_expert(
            files, parallel=parallel, mesh=mesh, shard=shard, device=CPU, attention=in_bf16,
            exact_attention=attention,
        )  # fmt: skip
        found = []
        for exact in (True, False, True, False, False):
            model.compute_exactly(exact)
            found.append(velocity_by(model, parallel, mesh, shard, times=1)[0])
        return found

    plain = velocities(Parallel(gpu_count=1, **settings), None)
    assert torch.equal(plain[0], plain[2]) and torch.equal(plain[1], plain[3])
    rounding, packed = ((plain[1] - plain[0]).norm() / plain[0].norm()).item(), []
    assert rounding > 1e-2
    for fsdp, engine in ((True, "packed"), (False, "packed"), (False, "symmetric")):
        out = velocities(spread_over(world, use_fsdp=fsdp, ulysses_engine=engine, **settings), mesh)
        for index, (mine, theirs) in enumerate(zip(out, plain, strict=True)):
            # A code may be rounded to its neighbour.
            error = ((mine - theirs).norm() / theirs.norm()).item()
            assert error < rounding / 2, f"{engine}, step {index}: {error}"
        packed = packed or out
        assert all(map(torch.equal, out, packed)), f"use_fsdp {fsdp}, {engine}"
    # Both kinds of blocks took turns in one memory.
    layouts = symmetric._layouts[mesh.ulysses_group.group_name].by_dtypes
    assert len(layouts) == 2 and len({id(layout._memory) for layout in layouts.values()}) == 1
