"""Every way to run a job on a number of GPUs that the user's switches allow, and how fast each is.

The times are for ranking: rates of a large GPU, and the bytes that each way moves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from ..job.job import Parallel
from .gpu_memory import Workload, compute_bytes, rank_tokens

COMPUTE = 4e14
"""Floating-point operations per second of one GPU."""
LINK_BYTES = {"nvlink": 3e11, "pcie": 2e10, "host": 1e10, "unknown": 1e10}
"""Per second and direction between two GPUs."""
FAST_LINK = "nvlink"
HOST_BYTES = 2e10
"""Per second between a GPU and host memory."""
FSDP_SLOWDOWN = 1.06
"""Gathering takes part of the GPU from the matrix products that it runs beside."""
CHUNKING_SLOWDOWN = 1.03
SHOWN = 0.05
"""Of a symmetric exchange, what is waited for however long the attention takes: measured over the host's memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the user asked for."""

    base: Parallel
    """What the planner leaves alone: precision, engine, compilation, time limits. Its switches are the user's: on
    means so, off leaves the planner its choice, but use_ulysses and use_fsdp, whose off means never."""
    gpu_count: int = 0
    """0: the planner's choice."""
    cfg_parallel: str = "auto"
    """auto, on or off."""
    always_guided: bool = False
    """Every step has a pass for the negative prompt."""


def policies(work: Workload, request: Request, gpu_count: int) -> list[Parallel]:
    """All that `request` allows on this number of GPUs; none where its settings rule the number out."""
    base = request.base
    even, shares = gpu_count % 2 == 0, base.use_ulysses or base.use_fsdp
    both = [True, False] if even and shares and request.always_guided else [False]
    cfg = {"on": [True], "off": [False], "auto": both}
    if request.cfg_parallel == "on" and not even:
        return []
    return [
        dataclasses.replace(
            base, gpu_count=gpu_count, gpu_ids=(), cfg_parallel=cfg, memory_optimization=chunked,
            use_fsdp=sharded is not None, gather=sharded or "block", offload_model=offload, stream_blocks=stream,
            ulysses_engine=engine,
        )
        for cfg, chunked, (sharded, offload, stream) in product(
            cfg[request.cfg_parallel], [True] if base.memory_optimization else [False, True],
            _weights(work, base, gpu_count),
        )
        for engine in _engines(base, gpu_count // (2 if cfg else 1))
        if _sensible(work, base, gpu_count // (2 if cfg else 1), sharded is not None)
    ]  # fmt: skip


def _weights(work: Workload, base: Parallel, gpu_count: int) -> Iterator[tuple[str | None, bool, bool]]:
    """(what FSDP gathers, offload, stream): where the weights are."""
    two = len(work.experts) > 1
    sharding = [None, "expert", "block"] if base.use_fsdp and gpu_count > 1 else [None]
    if not base.stream_blocks:
        yield from product(sharding, [True] if base.offload_model else [False, True][: 1 + two], [False])
    yield None, two or base.offload_model, True


def _engines(base: Parallel, ulysses_size: int) -> list[str]:
    if base.ulysses_engine != "auto":
        return [base.ulysses_engine]
    return ["symmetric", "packed"] if base.use_ulysses and ulysses_size > 1 else ["packed"]


def _sensible(work: Workload, base: Parallel, ulysses_size: int, sharded: bool) -> bool:
    if base.ulysses_engine == "deepspeed" and base.use_ulysses and work.config.num_heads % ulysses_size:
        return False
    # Otherwise ranks would compute the same, and share nothing.
    return ulysses_size == 1 or base.use_ulysses or sharded


def intrusion(parallel: Parallel, base: Parallel) -> int:
    """How far the planner goes beyond switches that are off: 2 streams blocks, 1 offloads, 0 neither."""
    if parallel.stream_blocks and not base.stream_blocks:
        return 2
    return int(parallel.offload_model and not base.offload_model and not base.stream_blocks)


def levels(ways: Sequence[tuple[Parallel, float]], base: Parallel, link: str) -> list[int]:
    """The `intrusion` of each of the ways to use the same GPUs, given with its seconds.

    Over a slow link, what is faster than sharding goes no further than that: it sends no weights there.
    """
    own = [intrusion(parallel, base) for parallel, _ in ways]
    sharded = [(level, time) for level, (parallel, time) in zip(own, ways, strict=True) if parallel.use_fsdp]
    if link == FAST_LINK or not sharded:
        return own
    least, limit = min(sharded)
    return [min(level, least) if time < limit else level for level, (_, time) in zip(own, ways, strict=True)]


def seconds(work: Workload, parallel: Parallel, ulysses_link: str, link: str) -> float:
    """Denoising time of the whole job.

    Args:
        ulysses_link: the slowest link among GPUs that share a sequence, a key of `LINK_BYTES`.
        link: the slowest one among all.
    """
    config, gpus, size = work.config, parallel.gpu_count, parallel.ulysses_size
    dim, layers, tokens = config.dim, work.block_runs, rank_tokens(work, parallel)
    matrices = 2 * (6 * dim + 2 * config.ffn_dim) * dim * tokens * layers
    heads = math.ceil(config.num_heads / size) / config.num_heads if parallel.use_ulysses else 1.0
    attention = 4 * work.tokens**2 * dim * layers * heads / COMPUTE
    forward, exchange = matrices / COMPUTE + attention, 0.0
    if parallel.use_ulysses and size > 1:
        exchanged = 4 * tokens * dim * compute_bytes(parallel) * (size - 1) / size
        exchange = layers * exchanged / LINK_BYTES[ulysses_link]
        # Beside the attention, but for its first part.
        forward += max(exchange - attention, exchange * SHOWN) if parallel.ulysses_engine == "symmetric" else exchange
    if parallel.memory_optimization:
        forward *= CHUNKING_SLOWDOWN
    other_ranks = (gpus - 1) / gpus
    moved = 0.0
    # What lies between slow links and the GPU is one bus: the exchange has to pass there, too.
    beside = 0.0 if ulysses_link == FAST_LINK else exchange
    if parallel.stream_blocks:
        forward = max(forward, work.blocks_bytes / HOST_BYTES + beside)
        # Each process copies all of it into memory of its own.
        moved = sum(work.experts) * gpus / HOST_BYTES
    elif parallel.offload_model and len(work.experts) > 1:
        # One goes and one comes, once while loading and once between the experts.
        moved = 4 * max(work.experts) / (gpus if parallel.use_fsdp else 1) / HOST_BYTES
    if parallel.use_fsdp and parallel.gather == "block":
        forward = max(forward, work.blocks_bytes * other_ranks / LINK_BYTES[link] + beside) * FSDP_SLOWDOWN
    elif parallel.use_fsdp:
        moved += sum(work.experts) * other_ranks / LINK_BYTES[link]
    passes = 2 if work.guided and not parallel.cfg_parallel else 1
    return work.steps * passes * forward + moved
